"""The way of the data with arrays of a device: nothing of it may pass NumPy unasked."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import backend, memory, nn
from hpcml.comm import axis, staging
from hpcml.comm.staging import beside
from hpcml.errors import MemoryLimitError
from hpcml.models.gpt import GPT, NextTokenLoss
from tests.device import emulator
from tests.device.standin import streams

STEPS = 2


@pytest.fixture(autouse=True)
def upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each kernel once: that the order of its threads is none is shown by its own tests."""
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))


def model(dropout: float = 0.1) -> GPT:
    return GPT(vocab_size=19, sequence_length=6, layers=2, heads=2, width=8, dropout=dropout)


def tokens(samples: int = 4) -> Any:
    made = np.random.default_rng(3).integers(0, 19, (samples, 7))
    return made[:, :-1], made[:, 1:]


def trained(kind: str, dtype: str, ranks: int = 1, **how: Any) -> tuple[list[float], Any]:
    """Losses of some steps and the parameters after them, by name."""
    mesh_sizes = how.pop("mesh", {"dp": ranks})

    def program() -> Any:
        made = model()
        made.to(backend.dtype(dtype)).to(kind)
        step = hpcml.parallelize(
            made, loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, lr=1e-2,
            mesh=hpcml.Mesh(**mesh_sizes), microbatch=1, seed=5, grad_clip=1.0, **how,
        )  # fmt: skip
        losses = [step(tokens()) for _ in range(STEPS)]
        losses.append(step.evaluate([tokens()]))
        return losses, {name: np.array(array) for name, array in step.gathered()}

    return hpcml.run(program, ranks=ranks)[0]  # type: ignore[no-any-return]


@functools.cache
def serial(dtype: str) -> Any:
    """What one rank finds on the CPU."""
    return trained("cpu", dtype)


def same(found: Any, dtype: str, tolerance: float) -> None:
    """Assert that losses and parameters are those of one rank on the CPU."""
    expected = serial(dtype)
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        np.testing.assert_allclose(
            found[1][name].astype(float), values.astype(float), rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-4)])
def test_a_serial_step(dtype: str, tolerance: float, device: Any) -> None:
    same(trained("cuda", dtype), dtype, tolerance)


def test_a_serial_step_in_16_bits(device: Any) -> None:
    """Rounded elsewhere than on the CPU, which widens around every primitive: near, not equal."""
    found = trained("cuda", "bfloat16")
    np.testing.assert_allclose(found[0], serial("bfloat16")[0], rtol=2e-2)


STAGES = range(4) if os.environ.get("HPCML_GPU") == "1" else (0, 3)
"""A stand-in shows nothing with the others that it does not with these."""


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_divide_the_states(stage: int, device: Any) -> None:
    found = trained("cuda", "float64", ranks=3, zero=stage)
    same(found, "float64", 1e-10)


@pytest.mark.parametrize(
    "mode", [{"mode": "local", "period": 2}, {"mode": "async", "elastic": 0.2}]
)
def test_ranks_apart(mode: dict[str, Any], device: Any) -> None:
    """Copies that differ: as the same ranks on the CPU."""
    expected = trained("cpu", "float64", ranks=2, **mode)
    found = trained("cuda", "float64", ranks=2, **mode)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
    for name, values in expected[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=0, atol=1e-10, err_msg=name)


def test_updates_in_the_background(device: Any) -> None:
    """With none late, as they are with a bound of 0."""
    same(trained("cuda", "float64", ranks=2, mode="async"), "float64", 1e-10)


def test_ranks_that_divide_the_model(device: Any) -> None:
    found = trained("cuda", "float64", ranks=2, mesh={"tp": 2}, sequence_parallel=True)
    same(found, "float64", 1e-10)


def test_ranks_that_divide_the_layers(device: Any) -> None:
    found = trained("cuda", "float64", ranks=2, mesh={"pp": 2}, schedule="1f1b")
    same(found, "float64", 1e-10)


def test_ranks_that_divide_the_context(device: Any) -> None:
    found = trained("cuda", "float64", ranks=2, mesh={"cp": 2})
    same(found, "float64", 1e-10)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("mesh", "zero", "reads"),
    [({"dp": 1}, 0, [2]), ({"dp": 2}, 0, [2, 2]), ({"dp": 2}, 3, [2, 2]), ({"tp": 2}, 0, [2, 2]),
     ({"pp": 2}, 0, [1, 2])],
)  # fmt: skip
def test_a_step_waits_for_the_device_as_often_as_it_must(
    mesh: dict[str, int], zero: int, reads: list[int], overlap: bool, standing_in: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once for the losses of its microbatches, after all work was started, and once for the norm.

    The first stage of a pipeline has no losses. Beside that, once for each message that is sent or
    received, and in the background once at the end of an operation; what threads wait for, to copy
    from one to the other, processes do not.
    """
    started: Counter[int] = Counter()
    for name in ("isend", "irecv"):
        monkeypatch.setattr(staging, name, counting(getattr(staging, name), started))
    monkeypatch.setattr(axis, "beside", lambda x, call: beside(x, counting(call, started)))
    before_all, looked = streams.count.copy(), []

    def program() -> tuple[int, int]:
        made = model(dropout=0.1)
        made.to(np.float32).to("cuda")
        step = hpcml.parallelize(
            made, loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, lr=1e-2,
            mesh=hpcml.Mesh(**mesh), microbatch=2, seed=5, grad_clip=1.0, zero=zero,
            overlap=overlap,
        )  # fmt: skip
        step(tokens())
        before, begun = streams.here(), started[threading.get_ident()]
        step(tokens())
        spent = streams.here() - before
        looked.append(streams.here()["reads"])
        return spent["reads"], stray(spent) - (started[threading.get_ident()] - begun)

    assert hpcml.run(program, ranks=len(reads)) == [(count, 0) for count in reads]
    # The same for all threads together; those in the background look at no values.
    spent_by_all = streams.count - before_all
    assert (stray(spent_by_all), spent_by_all["reads"]) == (started.total(), sum(looked))


def stray(spent: Counter[str]) -> int:
    """Waits that are neither for values nor of threads that copy to another's memory."""
    return spent["syncs"] - spent["whole device"] - spent["reads"]


def counting(call: Callable[..., Any], calls: Counter[int]) -> Callable[..., Any]:
    """The call, counted for the thread that makes it."""

    def made(*args: Any) -> Any:
        calls[threading.get_ident()] += 1
        return call(*args)

    return made


def test_memory_of_a_device_is_counted_and_limited(device: Any) -> None:
    gc.collect()
    account = memory.account()
    before = account.live["grads"]
    made = memory.empty((100, 10), np.float32, "grads", "cuda")
    part = made[3:]
    del made
    assert account.live["grads"] - before == 4000
    del part
    assert account.live["grads"] == before
    memory.set_limit(account.total + 1000)
    try:
        with pytest.raises(MemoryLimitError, match="4,000 bytes of optim exceed"):
            memory.zeros((1000,), np.float32, "optim", "cuda")
    finally:
        memory.set_limit(0)


def test_what_operations_of_cupy_need_on_their_way_is_counted(device: Any) -> None:
    account = memory.account()
    with memory.category("buffers"):
        x = memory.zeros((1000,), np.float32, device="cuda")
        account.reset_peak()
        before = account.total
        y = (x + 1) * 2
    assert account.live["buffers"] >= 8000 and account.total - before == 4000
    assert account.peak_total - before == 8000  # x + 1, while y is made
    del x, y


def test_a_gpu_without_room_is_told_with_where_all_of_it_went(
    standing_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = memory.empty((100,), np.float32, "params", "cuda")
    monkeypatch.setattr(standing_in.get_default_memory_pool(), "room", 1000)
    with pytest.raises(MemoryLimitError, match="4,000 bytes of optim exceed what the GPU") as found:
        memory.empty((1000,), np.float32, "optim", "cuda")
    assert found.value.live["params"] >= held.nbytes and "where did all" in str(found.value)


class Images(nn.Module):
    """A little of everything that models of images are made of."""

    spatial: ClassVar = {"layers.5": "gather"}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, stride=2, groups=2), nn.AvgPool2d(2, stride=1),
            nn.Flatten(), nn.Linear(4, 5),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.layers(x)


def of_images(kind: str, dtype: str, ranks: int = 1, **how: Any) -> list[float]:
    """Losses of some steps with images."""
    random = np.random.default_rng(2)
    batch = random.standard_normal((3, 3, 10, 10)), random.integers(0, 5, 3)

    def program() -> list[float]:
        made = Images().to(backend.dtype(dtype)).to(kind)
        step = hpcml.parallelize(
            made, loss=nn.CrossEntropyLoss(), optimizer=hpcml.optim.SGD, lr=0.1, momentum=0.9,
            mesh=hpcml.Mesh(**how or {"dp": 1}), seed=4,
        )  # fmt: skip
        return [step(batch) for _ in range(3)]

    return hpcml.run(program, ranks=ranks)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("bfloat16", 3e-2)])
def test_images(dtype: str, tolerance: float, device: Any) -> None:
    np.testing.assert_allclose(of_images("cuda", dtype), of_images("cpu", dtype), rtol=tolerance)


def test_ranks_that_divide_the_images(device: Any) -> None:
    found = of_images("cuda", "float64", 2, sp_h=2)
    np.testing.assert_allclose(found, of_images("cpu", "float64"), rtol=1e-10)
