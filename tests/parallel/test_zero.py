"""ZeRO in every stage and form against one process, also among groups of ranks."""

from __future__ import annotations

import numpy as np
import pytest

import hpcml
from hpcml.autograd import Tensor, contributions
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.optim import SGD
from hpcml.parallel import Step, groups
from hpcml.parallel.zero import Zero
from tests.parallel.cases import (
    KINDS,
    OPTIMIZERS,
    WAYS,
    compare,
    make,
    reference,
    run,
    serial_mesh,
    values,
)

cases = pytest.mark.parametrize
RUNS = [  # kind, optimizer, size, microbatch
    ("gpt", "adamw", 8, 0), ("gpt", "adamw", 1, 1), ("gpt", "adamw", 5, 2), ("own", "adamw", 8, 3),
    ("mlp", "sgd", 8, 3),
]  # fmt: skip


# Each stage with every run; each other way with shares that differ, and with another run in turn.
TOGETHER = [
    *((stage, *one) for stage in "123" for one in RUNS),
    *((way, *RUNS[2]) for way in list(WAYS)[3:]),
    *((way, *[*RUNS[:2], *RUNS[3:]][turn % 4]) for turn, way in enumerate(list(WAYS)[3:])),
]


@cases(("way", "kind", "optimizer", "size", "microbatch"), TOGETHER)
@pytest.mark.mpi
def test_parameters_in_float64(
    way: str, kind: str, optimizer: str, size: int, microbatch: int
) -> None:
    expected = reference(kind, "float64", optimizer, size, 5)
    found = run(kind, Mesh(), "float64", optimizer, size, microbatch, 5, **WAYS[way])
    compare(found, expected)


@cases("stage", [1, 2, 3])
@cases("kind", KINDS)
def test_one_process_alone(kind: str, stage: int) -> None:
    expected = reference(kind, "float64", "sgd", 8, 5)
    compare(run(kind, serial_mesh(), "float64", "sgd", 8, 3, 5, zero=stage), expected)


@cases("stage", [0, 1, 2, 3])
@pytest.mark.mpi
def test_losses_and_gradients_in_float32(stage: int) -> None:
    expected = reference("gpt", "float32", "adamw", 7, 20)
    mesh = Mesh()
    found = run("gpt", mesh, "float32", "adamw", 7, 3, 20, zero=stage)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    first, alone = (
        gradients(make("gpt", where, "float32", lr=0.0, zero=zero))
        for where, zero in ((mesh, stage), (serial_mesh(), 0))
    )
    for name, array in alone.items():
        np.testing.assert_allclose(
            first[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name
        )


def gradients(step: Step) -> dict[str, np.ndarray]:
    """Of the first step, from what SGD's momentum holds then: the gradient and the decay."""
    step(KINDS["gpt"].batch(7, 0))
    storage, state = step.optimizer.storage, step.optimizer.state["momentum_buffer"]
    parts = [np.zeros(bucket.size, np.float32) for bucket in storage.trained]
    start = 0
    for bucket, part in zip(storage.trained, parts, strict=True):
        mine = storage.sharding.owned("optim", bucket)
        length = mine.stop - mine.start
        part[mine] = state[start : start + length]
        start += length
        if storage.sharding.stage:
            step.groups.shard.allreduce(part, out=part)
    return {
        p.name: bucket.view(part, number)
        for bucket, part in zip(storage.trained, parts, strict=True)
        for number, p in enumerate(bucket.parameters)
    }


def test_evaluation_in_every_stage(mesh: Mesh) -> None:
    batches = [KINDS["gpt"].batch(size, size) for size in (7, 1)]
    expected = make("gpt", serial_mesh()).evaluate(batches)
    for stage in range(4):
        step = make("gpt", mesh, zero=stage, microbatch=2, overlap=stage == 3)
        assert step.evaluate(batches) == pytest.approx(expected, rel=1e-12)
        step(batches[0])
        assert step.evaluate(batches) < expected


@cases("deterministic", [False, True])
@cases("overlap", [False, True])
@cases("stage", [0, 1, 2, 3])
def test_in_a_loop_of_ones_own(mesh: Mesh, stage: int, overlap: bool, deterministic: bool) -> None:
    """The states by themselves, without `parallelize`, with two microbatches a rank."""
    expected = make("mlp", serial_mesh(), microbatch=2)
    model = KINDS["mlp"].model().double().name_parts()
    hpcml.manual_seed(3)
    where = Mesh(deterministic=deterministic) if mesh.size > 1 else mesh
    optimizer = SGD(model.parameters(), **OPTIMIZERS["sgd"][1])
    states = Zero(
        model, optimizer, groups.divide(where, stage), overlap=overlap, deterministic=deterministic
    )
    axis = where["dp"]
    for number in range(3):
        x, y = KINDS["mlp"].batch(4 * axis.size, number)
        expected((x, y))
        states.begin(2)
        for k in range(2):
            first = 2 * (k * axis.size + axis.rank)
            mine = slice(first, first + 2)
            loss = KINDS["mlp"].loss(model(Tensor(x[mine])), Tensor(y[mine]))
            states.before_backward(contributions(loss), last=k == 1)
            loss.backward(np.array(0.5 / axis.size))
            states.after_backward()
        states.finish()
        assert states.norm() == pytest.approx(expected.grad_norm, rel=1e-12)
        states.update()
    for name, array in states.gathered():
        np.testing.assert_allclose(array, values(expected)[name], rtol=0, atol=1e-12, err_msg=name)


@cases("stage", [2, 3])
def test_a_backward_that_raised_is_over_when_a_step_begins(stage: int) -> None:
    """What comes before the next one is not reduced: a pipeline may compute it early."""
    model = KINDS["mlp"].model().double().name_parts()
    optimizer = SGD(model.parameters(), **OPTIMIZERS["sgd"][1])
    states = Zero(model, optimizer, groups.divide(serial_mesh(), stage))
    x, y = KINDS["mlp"].batch(4, 0)
    for _ in range(2):
        states.begin()
        loss = KINDS["mlp"].loss(model(Tensor(x)), Tensor(y))
        assert all(p.gradient is None for p in model.parameters())
        loss.backward()
        assert all(p.gradient is not None for p in model.parameters())
        states.begin()
        loss = KINDS["mlp"].loss(model(Tensor(x)), Tensor(y))
        states.before_backward(contributions(loss))  # and what follows raises


# --- groups of ranks ----------------------------------------------------------------------------


@cases(("stage", "split", "overlap"), [
    (1, "blocks", True), (2, "blocks", False), (3, "blocks", True),
    (1, "layers", False), (2, "layers", True), (3, "layers", False),
])  # fmt: skip
@cases("shards", [1, 2])
@pytest.mark.mpi(min_size=2)
def test_shards_within_groups(shards: int, stage: int, split: str, overlap: bool) -> None:
    mesh = Mesh()
    if mesh.size % shards:
        with pytest.raises(UserError, match=f"shard_ranks={shards} must divide the {mesh.size}"):
            make("gpt", mesh, zero=stage, shard_ranks=shards)
        return
    found = run(
        "gpt", mesh, "float64", "adamw", 8, 3, 5,
        zero=stage, shard_ranks=shards, zero_split=split, overlap=overlap,
    )  # fmt: skip
    compare(found, reference("gpt", "float64", "adamw", 8, 5))


@pytest.mark.mpi(min_size=2)
@cases("stage", [0, 1, 2, 3])
def test_replicas_are_checked_in_every_stage(stage: int) -> None:
    """All ranks hear of it, and of the parameter."""
    mesh = Mesh()
    step = make("gpt", mesh, zero=stage, shard_ranks=1 if stage else 0)
    step(KINDS["gpt"].batch(4, 0))
    step.check_replicas()
    bucket = step.optimizer.storage.buckets[-1]
    last = bucket.parameters[-1].name
    if mesh.rank == mesh.size - 1:
        bucket.data[bucket.slices[-1].stop - 1] += 1
    with pytest.raises(RuntimeError, match=f"drifted apart: parameter {last} differs"):
        step.check_replicas()
