"""Saved arrays in a file until backward: the same gradients with less memory."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from hpcml import backend, memory, rng
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel import offload
from hpcml.parallel.offload import Store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_gradients_with_less_memory(tmp_path: Path, dtype: str) -> None:
    """Of several microbatches at once, in any order; space in the file is used again."""
    store = Store(str(tmp_path))
    model = GPT(11, 30, 3, 2, 50, dropout=0.1).to(backend.dtype(dtype)).name_parts()
    tokens = np.random.default_rng(0).integers(0, 11, (2, 3, 30))
    found: dict[bool, list[bytes]] = {}
    held = {}
    for moves in (False, True):
        ends = []
        for _ in range(2):
            gc.collect()
            before = memory.account().live["activations"]
            losses = []
            for number in range(2):
                with rng.samples(1, 3 * number):
                    if moves:
                        with store.offloaded():
                            losses.append(NextTokenLoss()(model(tokens[0]), tokens[1]))
                    else:
                        losses.append(NextTokenLoss()(model(tokens[0]), tokens[1]))
            held[moves] = memory.account().live["activations"] - before
            model.zero_grad()
            for loss in losses:
                loss.backward()
            found[moves] = [p.grad.numpy().tobytes() for p in model.parameters()]
            del losses, loss
            ends.append(store._end)
        assert ends[0] == ends[1]
    assert found[True] == found[False]
    assert held[True] < 0.15 * held[False]
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_what_several_uses_save_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    from hpcml import Tensor

    store, x = Store(), Tensor(np.arange(5.0), True)
    with store.offloaded():
        y = x * x * x
    assert store._end == 2 * 5 * 8  # x and its square
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 3 * np.arange(5.0) ** 2)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*set pipeline.offload_dir") as caught:
        Store(str(tmp_path / "nowhere")).open()
    assert "\n" not in str(caught.value)
    store = Store(str(tmp_path))
    with Path("/dev/full").open("wb", buffering=0) as full:
        store._file = full.fileno()
        with pytest.raises(UserError, match=r"set pipeline.offload_dir to a folder with room"):
            store.put(np.ones(5000))
