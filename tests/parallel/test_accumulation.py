"""Accumulation by hand (`no_sync`): one large batch, what it moves, where it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.comm import Mesh
from hpcml.errors import UserError
from tests.parallel.cases import KINDS, make, serial_mesh, values

cases = pytest.mark.parametrize


@cases("deterministic", [False, True])
@cases("overlap", [False, True])
@cases("stage", [0, 1])
def test_no_sync_makes_one_large_batch(
    mesh: Mesh, stage: int, overlap: bool, deterministic: bool
) -> None:
    if deterministic:
        mesh = Mesh(deterministic=True) if mesh.size > 1 else mesh
    x, y = KINDS["mlp"].batch(12, 0)
    whole = make("mlp", serial_mesh())
    whole((x, y))
    step = make("mlp", mesh, zero=stage, overlap=overlap)
    before = mesh.ledger.snapshot()
    with step.no_sync():
        first = step((x[:5], y[:5]))
        step((x[5:6], y[5:6]))
        sent = (mesh.ledger.snapshot() - before).get("dp", {})
        assert deterministic or all(count.bytes < 1000 for count in sent.values())
    last = step((x[6:], y[6:]))
    assert first != last
    assert step.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    for name, array in values(whole).items():
        np.testing.assert_allclose(values(step)[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("stage", [0, 1])
def test_an_error_ends_an_accumulation(mesh: Mesh, stage: int) -> None:
    """Half a batch must not count: the next step begins anew."""
    batch = KINDS["mlp"].batch(6, 0)
    step, expected = make("mlp", mesh, zero=stage, microbatch=1), make("mlp", serial_mesh())

    def fail(*_: Any) -> None:
        raise RuntimeError("by the way")

    with step.no_sync():
        step(batch)
        handle = step.model.layers[0].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(RuntimeError, match="by the way"):
            step(batch)
    handle.remove()
    step(batch)
    expected(batch)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)


@cases("stage", [2, 3])
def test_no_sync_is_refused_where_it_saves_nothing(stage: int) -> None:
    step = make("mlp", serial_mesh(), zero=stage)
    with (
        pytest.raises(UserError, match=rf"no_sync\(\) with zero={stage}.*microbatch"),
        step.no_sync(),
    ):
        pass


@pytest.mark.mpi(min_size=2)
def test_what_accumulation_moves() -> None:
    """With A microbatches stage 2 moves A + 1 and stage 3 moves 3 A times the parameters."""
    for stage, expected in ((0, 2), (1, 2), (2, 4 + 1), (3, 3 * 4)):
        mesh = Mesh()
        step = make("gpt", mesh, "float32", zero=stage, microbatch=2, model=plain_gpt())
        count = sum(p.numel() for p in step.model.parameters())
        batch = KINDS["gpt"].batch(2 * 4 * mesh.size, 0)
        step(batch)
        before = mesh.ledger.snapshot()
        step(batch)
        moved = (mesh.ledger.snapshot() - before)["dp"]
        elements = sum(
            c.bytes / 4 * (2 if name == "all_reduce" else 1) for name, c in moved.items()
        )
        # The unit with which forward ends stays for backward; norms and losses are all-reduced.
        assert elements / count == pytest.approx(expected, rel=0.05), stage


def plain_gpt() -> nn.Module:
    return hpcml.models.GPT(11, 5, layers=6, heads=2, width=64)
