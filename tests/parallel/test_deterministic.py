"""Deterministic mode: the same bits for any number of ranks, ZeRO stage and form of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import backend
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.kernels.cpu import team
from hpcml.parallel import Step
from hpcml.train.weights import fingerprint
from tests.parallel.cases import CLIP, KINDS, decay_matrices, make

cases = pytest.mark.parametrize
SIZE, MICROBATCH, STEPS = 11, 2, 3


def trained(kind: str, optimizer: str, dtype: str, mesh: Mesh, **options: Any) -> Step:
    step = make(
        kind, mesh, hpcml.backend.dtype(dtype), optimizer, microbatch=MICROBATCH, grad_clip=CLIP,
        groups=decay_matrices, **options,
    )  # fmt: skip
    for number in range(STEPS):
        step(KINDS[kind].batch(SIZE, number))
    return step


def outcome(step: Step) -> tuple[str, float]:
    """Hash of the parameters, and the norm of the last gradient."""
    return fingerprint(step.gathered()), step.grad_norm


def in_threads(ranks: int, *run: str, **options: Any) -> tuple[str, float]:
    """The outcome of a run of so many ranks, the same on all."""
    outcomes = hpcml.run(
        lambda: outcome(trained(*run, Mesh(deterministic=True), **options)), ranks=ranks
    )
    assert all(found == outcomes[0] for found in outcomes)
    return outcomes[0]


@cache
def alone(*run: str, bucket_mb: float = 25.0) -> tuple[str, float]:
    return in_threads(1, *run, bucket_mb=bucket_mb)


RUNS = [("gpt", "adamw", "float32"), ("own", "sgd", "float64"), ("gpt", "sgd", "bfloat16"),
        ("mlp", "adamw", "float16")]  # fmt: skip


@cases("ranks", [2, 3, 4, 8])
@cases("stage", [0, 1, 2, 3])
@cases("run", RUNS, ids="-".join)
def test_bits_do_not_depend_on_ranks_and_stage(
    run: tuple[str, ...], stage: int, ranks: int
) -> None:
    assert in_threads(ranks, *run, zero=stage) == alone(*run)


@cases(
    "options",
    [{"zero": 3, "bucket_mb": 1e-4}, {"zero": 2, "overlap": True}, {"zero": 3, "overlap": True},
     {"zero": 3, "overlap": True, "bucket_mb": 1e-4}, {"zero": 0, "overlap": True},
     {"zero": 1, "overlap": True}]
    + [{"zero": stage, "shard_ranks": shards} for stage in (1, 2, 3) for shards in (1, 2)],
    ids=str,
)  # fmt: skip
def test_nor_on_how_it_is_done(options: dict[str, Any]) -> None:
    run = RUNS[0]
    size = {name: value for name, value in options.items() if name == "bucket_mb"}
    assert in_threads(4, *run, **options) == alone(*run, **size)  # by buckets the norm is added up


@cases("stage", [1, 2, 3])
@cases("shards", [1, 2, 4])
def test_nor_on_groups_with_one_microbatch_a_rank(shards: int, stage: int) -> None:
    """Where gradients might stay at home until all are there: sums of sums have another order."""

    def program(**options: Any) -> tuple[str, float]:
        mesh = Mesh(deterministic=True)
        step = make("gpt", mesh, "float32", "adamw", microbatch=MICROBATCH, **options)
        for number in range(STEPS):
            step(KINDS["gpt"].batch(4 * MICROBATCH, number))
        return outcome(step)

    expected = hpcml.run(program, ranks=1)
    found = hpcml.run(lambda: program(zero=stage, shard_ranks=shards), ranks=4)
    assert set(found) == set(expected)


@pytest.mark.mpi(min_size=2)
@cases("stage", [0, 1, 2, 3])
@cases("run", RUNS[:3], ids="-".join)
def test_bits_of_processes(run: tuple[str, ...], stage: int) -> None:
    """In shared memory and through messages alike."""
    found = outcome(trained(*run, Mesh(deterministic=True), zero=stage))
    assert found == alone(*run)


def test_microbatches_matter() -> None:
    """What the promise excludes is really different, so the comparisons above say something."""
    other = make("gpt", Mesh(hpcml_alone(), deterministic=True), "float32", "adamw", microbatch=3)
    for number in range(STEPS):
        other(KINDS["gpt"].batch(SIZE, number))
    assert outcome(other)[0] != alone(*RUNS[0])[0]
    ends = [in_threads(n, "gpt", "adamw", "float32", zero=2)[0] for n in (1, 4)]
    assert ends[0] == ends[1]


def hpcml_alone() -> Any:
    from hpcml.comm.alone import Alone

    return Alone()


def test_whole_layers_keep_no_order() -> None:
    with pytest.raises(UserError, match=r'zero.split="layers" does not keep the order'):
        make("mlp", Mesh(hpcml_alone(), deterministic=True), zero=1, zero_split="layers")


def test_without_it_bits_may_differ() -> None:
    """Sums in another order: this is what the mode is for."""

    def program() -> np.ndarray:
        step = trained("gpt", "adamw", "float32", Mesh(), zero=0)
        return np.concatenate([array.reshape(-1) for _, array in step.gathered()])

    one, four = hpcml.run(program, ranks=1)[0], hpcml.run(program, ranks=4)[0]
    assert (one != four).any()
    np.testing.assert_allclose(one, four, atol=1e-3)


@cases("run", RUNS, ids="-".join)
def test_nor_on_which_rank_has_the_threads(
    run: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ranks in one process one at a time has its team; the others do the same ranges alone."""
    monkeypatch.setattr(backend, "_threads", 2)
    monkeypatch.setattr(team, "LEAST", 1)
    expected = in_threads(1, *run)
    for ranks in (2, 3, 4):
        assert in_threads(ranks, *run) == expected
