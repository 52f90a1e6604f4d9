"""Collectives on views of shared memory: the same bits as messages, by the short way."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml.comm import Axis, Mesh
from hpcml.comm.inplace import Plan

pytestmark = pytest.mark.mpi(min_size=2)

Array = np.ndarray[Any, Any]
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_place = pytest.mark.parametrize(("offset", "rows"), [(0, 1), (3, 64), (1021, 5003)])


@pytest.fixture(scope="module", params=[False, True], ids=["any order", "deterministic"])
def axis(request: pytest.FixtureRequest) -> Axis:
    return Mesh(deterministic=request.param)["dp"]


def numbers(axis: Axis, count: int, dtype: np.dtype[Any], seed: int = 0) -> Array:
    """Other ones on each rank."""
    return (np.random.default_rng([seed, axis.rank]).normal(size=count) * 10).astype(dtype)


def place(axis: Axis, offset: int, rows: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """A view at this offset of shared memory with as many elements for each rank; the whole too."""
    whole = axis.empty(offset + axis.size * rows + 7, dtype)
    whole[...] = 77
    return whole[offset : offset + axis.size * rows], whole


def untouched(whole: Array, view: Array, offset: int) -> bool:
    return bool((whole[:offset] == 77).all() and (whole[offset + view.size :] == 77).all())


def way(axis: Axis, operation: str, x: Array, out: Array) -> object:
    """How the axis remembers to do this call."""
    calls = axis._known._calls
    return next(
        call[2].way for key, call in calls.items() if key[:3] == (operation, id(x), id(out))
    )


@every_type
@every_place
@pytest.mark.parametrize("home", [True, False])
def test_allgather(axis: Axis, dtype: np.dtype[Any], offset: int, rows: int, home: bool) -> None:
    out, whole = place(axis, offset, rows, dtype)
    own = out[axis.rank * rows : (axis.rank + 1) * rows]
    x = own if home else np.empty(rows, dtype)
    for turn in range(3):
        x[...] = numbers(axis, rows, dtype, turn)
        expected = axis.allgather(x.copy(), algorithm="ring")
        algorithm = None if turn else "window"  # which would be refused if there were none
        assert axis.allgather(x, out=out, algorithm=algorithm) is out
        assert out.tobytes() == expected.tobytes()
        axis.barrier()  # who is late must not see the next turn's
    assert isinstance(way(axis, "allgather", x, out), Plan)
    assert untouched(whole, out, offset)


@every_type
@every_place
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_reduce_scatter_into_ordinary_memory(
    axis: Axis, dtype: np.dtype[Any], offset: int, rows: int, accumulate: bool, op: str
) -> None:
    x, whole = place(axis, offset, rows, dtype)
    out = numbers(axis, rows, dtype, 9)
    expected = out.copy()
    for turn in range(3):
        given = numbers(axis, x.size, dtype, turn)
        x[...] = given
        axis.reduce_scatter(given, op, expected, accumulate=accumulate, algorithm="ordered")
        algorithm = None if turn else "window"
        found = axis.reduce_scatter(x, op, out, accumulate=accumulate, algorithm=algorithm)
        assert found is out and out.tobytes() == expected.tobytes()
        assert x.tobytes() == given.tobytes()
    assert isinstance(way(axis, "reduce_scatter", x, out), Plan)
    assert untouched(whole, x, offset)


@every_type
@every_place
def test_reduce_scatter_into_the_own_rows(
    axis: Axis, dtype: np.dtype[Any], offset: int, rows: int
) -> None:
    x, whole = place(axis, offset, rows, dtype)
    own = slice(axis.rank * rows, (axis.rank + 1) * rows)
    out = x[own]
    for turn in range(3):
        given = numbers(axis, x.size, dtype, turn)
        x[...] = given
        expected = given.copy()
        expected[own] = axis.reduce_scatter(given, algorithm="ordered")
        algorithm = None if turn else "window"
        assert axis.reduce_scatter(x, out=out, algorithm=algorithm) is out
        assert x.tobytes() == expected.tobytes()
    assert isinstance(way(axis, "reduce_scatter", x, out), Plan)
    assert untouched(whole, x, offset)
