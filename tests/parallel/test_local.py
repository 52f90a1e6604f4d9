"""Local SGD: what equals the synchronous step, when ranks meet, what evaluation leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.parallel.local import LocalStep
from tests.parallel.cases import CLIP, KINDS, decay_matrices, make, reference, run, values

cases = pytest.mark.parametrize
LOCAL = {"mode": "local"}


def differ(mesh: Mesh, step: Any) -> bool:
    """Whether the ranks have other parameters, as they lie in memory."""
    every = mesh.world.allgather(step.optimizer.storage.data)
    return bool((every.reshape(mesh.size, -1) != every[: every.size // mesh.size]).any())


@cases(("microbatch", "momentum"), [(0, 0.9), (1, 0.0), (3, 0.9)])
@cases("size", [1, 5, 8])  # ranks without a sample, shares that differ, and that do not
@cases("kind", ["own", "gpt"])
def test_period_1_is_synchronous(
    mesh: Mesh, kind: str, size: int, microbatch: int, momentum: float
) -> None:
    """With SGD: an average of updates is the update by the average."""
    options = {"momentum": momentum, "groups": decay_matrices, "microbatch": microbatch}
    sync, local = make(kind, mesh, **options), make(kind, mesh, **options, **LOCAL)
    assert isinstance(local, LocalStep)
    for number in range(5):
        batch = KINDS[kind].batch(size, number)
        assert local(batch) == pytest.approx(sync(batch), rel=1e-12)
        assert not differ(mesh, local)
    for name, array in values(sync).items():
        np.testing.assert_allclose(values(local)[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("optimizer", ["sgd", "adamw"])
def test_synchronous_steps_at_the_beginning(mesh: Mesh, optimizer: str) -> None:
    """With clipping and any optimizer, since gradients are summed, not parameters."""
    expected = reference("own", "float64", optimizer, 5, 5)
    found = run("own", mesh, "float64", optimizer, 5, 2, 5, **LOCAL, period=3, sync_steps=5)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-11)
    for name, array in expected.parameters[5].items():
        np.testing.assert_allclose(found.parameters[5][name], array, rtol=0, atol=1e-12)


@pytest.mark.mpi(min_size=2)
def test_when_ranks_meet() -> None:
    """After every third step that is not synchronous; the sum of traffic says so too."""
    mesh = Mesh()
    step = make("mlp", mesh, **LOCAL, period=3, sync_steps=2)
    parameters = step.optimizer.storage.data.nbytes
    apart, moved = [], []
    for number in range(9):
        before = mesh.ledger.snapshot()
        step(KINDS["mlp"].batch(8, number))
        sent = (mesh.ledger.snapshot() - before)["dp"]
        moved.append(sent["all_reduce"].bytes >= parameters)
        assert list(sent) == ["all_reduce"]
        apart.append(differ(mesh, step))
    assert apart == [False, False, True, True, False, True, True, False, True]
    assert moved == [True, True, False, False, True, False, False, True, False]
    step.settle()
    assert not differ(mesh, step)


@pytest.mark.mpi(min_size=2)
def test_the_average_is_that_of_the_ranks() -> None:
    """And what `gathered` gives in between, without a trace in what the ranks hold."""
    mesh = Mesh()
    step = make("mlp", mesh, "float64", "adamw", **LOCAL, period=2)
    step(KINDS["mlp"].batch(8, 0))
    own = step.optimizer.storage.data.copy()
    mean = mesh.world.allreduce(own) / mesh.size
    with step.settled():
        np.testing.assert_allclose(step.optimizer.storage.data, mean, rtol=0, atol=1e-15)
        expected = {name: p.data.copy() for name, p in step.model.named_parameters()}
    np.testing.assert_equal(values(step), expected)
    np.testing.assert_array_equal(step.optimizer.storage.data, own)
    step.settle()
    np.testing.assert_equal(values(step), expected)


@cases("options", [{"mode": "local", "period": 3}, {"mode": "async", "elastic": 0.2, "period": 3}])
def test_evaluation_leaves_training_alone(mesh: Mesh, options: dict[str, Any]) -> None:
    """To the bit, but for the centre's sum, which is made in the order in which ranks come."""
    plain, watched = (make("own", mesh, "float64", "adamw", **options) for _ in range(2))
    bound = 1e-13 if options["mode"] == "async" and mesh.size > 2 else 0.0
    seen = []
    for number in range(7):
        batch = KINDS["own"].batch(8, number)
        assert plain(batch) == pytest.approx(watched(batch), rel=bound, abs=0)
        seen.append(watched.evaluate([KINDS["own"].batch(5, 99)]))
        watched.check_replicas()
        mine, other = plain.optimizer.storage, watched.optimizer.storage
        np.testing.assert_allclose(mine.data, other.data, rtol=0, atol=bound)
    plain.settle()
    last = plain.evaluate([KINDS["own"].batch(5, 99)])
    assert last == pytest.approx(seen[-1], rel=bound, abs=0) and last != seen[0]


def test_clipping_is_by_the_ranks_own_norm(mesh: Mesh) -> None:
    step = make("mlp", mesh, lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip=CLIP, **LOCAL,
                period=9)  # fmt: skip
    before = step.optimizer.storage.data.copy()
    step(KINDS["mlp"].batch(8, 0))
    moved = float(np.linalg.norm(step.optimizer.storage.data - before))
    norm = float(np.linalg.norm(step.optimizer.storage.grad))
    assert norm > CLIP and moved == pytest.approx(CLIP, rel=1e-4)
    assert step.grad_norm == pytest.approx(mesh["dp"].allreduce(np.array([norm]))[0] / mesh.size)


def test_no_sync_gathers_a_larger_batch(mesh: Mesh) -> None:
    """Of each rank its own: nothing is communicated but losses."""
    parts, whole = make("mlp", mesh, **LOCAL, period=2), make("mlp", mesh, **LOCAL, period=2)
    x, y = KINDS["mlp"].batch(4 * mesh.size, 0)
    mine = np.arange(4 * mesh.size).reshape(mesh.size, 2, 2)  # by rank, then part
    with parts.no_sync():
        first = mine[:, 0].ravel()
        parts((x[first], y[first]))
    second = mine[:, 1].ravel()
    parts((x[second], y[second]))
    whole((x, y))
    assert parts.optimizer.steps == 1
    for own, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        np.testing.assert_allclose(own.data, other.data, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@cases("fault", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_all(mesh: Mesh, fault: str) -> None:
    step = make("own", mesh, "float32", loss=lambda out, y: (out * y).mean(), **LOCAL, period=4)
    good = KINDS["own"].batch(5, 0)
    step(good)
    x, y = (field.copy() for field in good)
    if fault == "loss":
        x[0] = np.nan
    else:
        step.model.head.bias.data[...] = step.model.head.weight.data[...] = 0.0
        y[0] = 3e38
        step.model.head.register_forward_hook(lambda module, args, out: out * 1e3)
    before = step.optimizer.storage.data.copy()
    with pytest.raises(NonFiniteError, match="step 1: "):
        step((x, y))
    np.testing.assert_array_equal(step.optimizer.storage.data, before)


@cases(
    ("options", "words"),
    [
        ({"mode": "lokal"}, ['mode="lokal"', "sync, local, async"]),
        ({"mode": "local", "zero": 1}, ["zero.stage=1", "mode=local", "use zero.stage=0"]),
        ({"mode": "async", "zero": 3}, ["zero.stage=3", "mode=async", "use zero.stage=0"]),
        ({"period": 4}, ["period=4", "mode=local", "period=1"]),
        ({"mode": "async", "period": 4}, ["period=4", "elastic"]),
        ({"mode": "local", "period": 0}, ["period=0", "1 or more"]),
        ({"mode": "local", "period": 1.5}, ["period=1.5", "whole number"]),
        ({"mode": "async", "staleness": 0.5}, ["staleness=0.5", "whole number"]),
        ({"mode": "local", "staleness": 1}, ["staleness=1", "mode=async"]),
        ({"mode": "async", "staleness": -1}, ["staleness=-1", "0 or more"]),
        ({"mode": "async", "sync_steps": 3}, ["sync_steps=3", "mode=local"]),
        ({"mode": "local", "elastic": 0.1}, ["elastic=0.1", "mode=async"]),
        ({"mode": "async", "elastic": 1.1}, ["elastic=1.1", "at most 1 / "]),
        ({"mode": "async", "elastic": float("nan")}, ["elastic=nan"]),
    ],
)
def test_what_does_not_go_together(mesh: Mesh, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make("mlp", mesh, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_numbers_of_16_bits_are_refused(mesh: Mesh) -> None:
    with pytest.raises(UserError, match=r"float16 with data_parallel.mode=local"):
        make("mlp", mesh, "float16", **LOCAL)


def test_the_order_of_additions_is_refused_where_there_is_none() -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            make("mlp", Mesh(deterministic=True), mode="async")
        return str(caught.value)

    assert "run.deterministic=true" in hpcml.run(refused, ranks=2)[0]


class Rooted(nn.Module):
    """With a slope that is infinite where its input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) ** 2).sqrt()


@pytest.mark.parametrize("way", [{"mode": "local"}, {"mode": "async", "elastic": 0.3}], ids=str)
def test_all_ranks_name_what_one_of_them_has_found(way: dict[str, Any]) -> None:
    """The gradient of a rank that trains by itself is seen by no other."""

    def program() -> str:
        step = make("own", Mesh(), model=Rooted().to(np.float64), **way)
        x, y = np.ones((4, 6)), np.ones((4, 1))
        x[-1] = 0
        with pytest.raises(NonFiniteError) as raised:
            step((x, y))
        return str(raised.value)

    for said in hpcml.run(program, ranks=2, timeout=30):
        assert "gradient of layer.weight is not finite" in said
