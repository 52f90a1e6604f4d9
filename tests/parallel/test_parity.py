"""Every layout of ranks and microbatches against the same run by one process, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.comm import Mesh
from tests.parallel.cases import (
    CLIP,
    KINDS,
    OPTIMIZERS,
    compare,
    make,
    reference,
    run,
    serial_mesh,
    values,
)

cases = pytest.mark.parametrize
SIZES = [1, 5, 8]  # ranks without a sample, shares that differ, and that do not
MICROBATCHES = [0, 1, 3, 50]
# Each size with each microbatch; all other pairs of two values occur too.
RUNS = [
    (list(KINDS)[(s + m) % 3], list(OPTIMIZERS)[(s + m // 2) % 2], size, microbatch)
    for s, size in enumerate(SIZES)
    for m, microbatch in enumerate(MICROBATCHES)
]


@cases(("kind", "optimizer", "size", "microbatch"), RUNS)
def test_parameters_in_float64(
    mesh: Mesh, kind: str, optimizer: str, size: int, microbatch: int
) -> None:
    expected = reference(kind, "float64", optimizer, size, 5)
    found = run(kind, mesh, "float64", optimizer, size, microbatch, 5)
    compare(found, expected)


@cases(("optimizer", "microbatch"), [("sgd", 0), ("sgd", 3), ("adamw", 1)])
@cases("kind", KINDS)
def test_losses_in_float32(mesh: Mesh, kind: str, optimizer: str, microbatch: int) -> None:
    expected = reference(kind, "float32", optimizer, 7, 20)
    found = run(kind, mesh, "float32", optimizer, 7, microbatch, 20)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


@cases("kind", KINDS)
def test_the_runs_clip_and_learn_something(kind: str) -> None:
    """Or the comparisons above would compare little."""
    for optimizer in OPTIMIZERS:
        made = reference(kind, "float64", optimizer, 5, 5)
        assert max(made.norms) > CLIP
        step = make(kind, serial_mesh())
        moved = {n for n, v in values(step).items() if (v != made.parameters[5][n]).any()}
        still = {name for name in values(step) if name.startswith("frozen.")}
        decayed = {"unused.weight"} & moved  # by weight decay alone, as its gradient is zero
        idle = {"unused.bias"} & values(step).keys()
        assert moved == values(step).keys() - still - idle
        assert decayed or kind != "own"


def test_parameters_are_those_of_rank_0(mesh: Mesh) -> None:
    """Whatever each rank had: given values, made values, frozen ones."""
    expected = values(make("own", serial_mesh()))
    model = KINDS["own"].model().to(np.float64).name_parts()
    for name, p in model.named_parameters():
        p.data[...] = expected[name] + mesh.rank
    step = make("own", mesh, model=model)
    for name, array in values(step).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
