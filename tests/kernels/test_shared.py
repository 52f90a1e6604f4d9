"""Sums over the memory of ranks, 16-bit floats as words, and the flags at which ranks meet."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml import kernels

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
every_half = pytest.mark.parametrize("half", HALVES, ids=str)
Array = np.ndarray[Any, Any]


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 3) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * 10).astype(dtype)


def in_order(rows: Array, start: Array | None = None) -> Array:
    """The sum of rows one after the other, each rounded to the type of the rows."""
    total = rows[0].copy() if start is None else start + rows[0]
    for row in rows[1:]:
        total = total + row
    return total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("first", "last"), [(0, 5000), (7, 4099), (40, 41), (9, 9)])
def test_sum_rows(dtype: str, ranks: int, first: int, last: int) -> None:
    shared = kernels.compiled(dtype).shared
    rows = normal((ranks, 5000), dtype)
    expected = in_order(rows)
    found = rows.copy()
    shared.sum_rows(found, found, 0, first, last, 0, False)
    assert (found[:, first:last] == expected[first:last]).all()
    assert (found[:, :first] == rows[:, :first]).all()
    assert (found[:, last:] == rows[:, last:]).all()

    out = normal((1, last - first), dtype, seed=4)
    onto = in_order(rows[:, first:last], out[0])
    shared.sum_rows(rows, out, 0, first, last, first, True)
    assert (out[0] == onto).all()


@every_half
@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_sum_half_rows(half: np.dtype[Any], stepwise: bool, onto: bool) -> None:
    shared = kernels.compiled("float32").shared
    rows = normal((4, 3001), half)
    out = normal((2, 3001), half, seed=5)
    parts = [out[1], *rows] if onto else [*rows]
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
        if stepwise:
            total = total.astype(half).astype(np.float32)
    words = (rows.view(np.uint16), out.view(np.uint16))
    shared.sum_half_rows(*words, 1, 0, 3001, 0, onto, half != np.float16, stepwise)
    expected = total.astype(half)
    assert out[0].tobytes() == out[1].tobytes() == expected.tobytes()


@every_half
def test_every_half_is_read_and_written(half: np.dtype[Any]) -> None:
    halves = kernels.compiled("float32").halves
    words = np.arange(1 << 16, dtype=np.uint16)
    expected = words.view(half).astype(np.float32)
    wide = np.empty(words.size, np.float32)
    halves.widen(words, wide, half != np.float16)
    np.testing.assert_array_equal(wide, expected)

    narrow = np.empty_like(words)
    halves.narrow(wide, narrow, half != np.float16)
    numbers = ~np.isnan(expected)
    assert (narrow == words)[numbers].all()
    assert np.isnan(narrow.view(half)[~numbers].astype(np.float32)).all()


@every_half
def test_rounding_to_nearest_even(half: np.dtype[Any]) -> None:
    """As NumPy rounds, ties and the edges of the range included."""
    halves = kernels.compiled("float32").halves
    edges = [0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 3.4e38, 6e-8, 2.9e-8, 1e-45]
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    x = np.concatenate([np.array(edges + ties, np.float32), normal((4001,), np.float32)])
    out = np.empty(x.size, np.uint16)
    halves.narrow(x, out, half != np.float16)
    with np.errstate(over="ignore"):
        assert out.tobytes() == x.astype(half).tobytes()
        halves.round_to_half(x, x.size, half != np.float16)
    np.testing.assert_array_equal(x, out.view(half).astype(np.float32))


def test_ranks_meet_and_see_what_was_written() -> None:
    """Three threads, each adding to what its neighbour wrote before the last meeting."""
    shared = kernels.compiled("float32").shared
    ranks, rounds = 3, 200
    flags = np.zeros(ranks * shared.FLAGS, np.int64)
    values = np.zeros((2, ranks), np.int64)

    def rank(number: int) -> None:
        for turn in range(1, rounds + 1):
            values[turn % 2, number] = values[(turn - 1) % 2, (number + 1) % ranks] + 1
            while shared.meet(flags, ranks, number, turn, 100, 100) >= 0:
                pass

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (values[rounds % 2] == rounds).all()


def test_a_rank_that_is_late_is_named() -> None:
    shared = kernels.compiled("float32").shared
    flags = np.zeros(3 * shared.FLAGS, np.int64)
    flags[shared.FLAGS] = 1
    assert shared.meet(flags, 3, 0, 1, 5, 5) == 2
    flags[2 * shared.FLAGS] = 1
    assert shared.meet(flags, 3, 0, 1, 5, 5) == -1


def test_calls_that_differ_are_found() -> None:
    shared = kernels.compiled("float32").shared
    flags = np.zeros(2 * shared.FLAGS, np.int64)
    assert shared.begin(flags, 2, 0, 1, 5, 5, 1, 0, 10, 4) == 1
    assert shared.begin(flags, 2, 1, 1, 5, 5, 1, 0, 10, 4) == -1
    assert shared.begin(flags, 2, 1, 1, 5, 5, 1, 0, 11, 4) == -2
