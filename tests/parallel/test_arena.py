"""Memory that is used again by what is alive at a time."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.backend import Array
from hpcml.parallel.arena import Arena


class Counted:
    """Allocates for an arena, and knows how much."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Array:
        self.sizes.append(size)
        return np.empty(size)


def test_places_are_used_again_and_never_twice_at_once() -> None:
    """Two units at a time, of any sizes, have places in two arrays of the largest."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 20)
    allocate = Counted()
    arena = Arena(allocate, [int(sizes.max())] * 2)
    before = arena.take(int(sizes[0]))
    before[...] = 0
    for number, size in enumerate(sizes[1:], 1):
        coming = arena.take(int(size))
        coming[...] = number
        assert np.all(before == number - 1)
        arena.give_back(before)
        before = coming
    assert allocate.sizes == [sizes.max()] * 2


def test_the_place_where_least_is_left() -> None:
    """Something small does not take the place of the next large one."""
    arena = Arena(allocate := Counted(), [100, 100])
    head = arena.take(90)
    norm = arena.take(10)
    assert arena.fits(100)
    block = arena.take(100)
    assert allocate.sizes == [100, 100]
    assert not arena.fits(1)
    for array in (head, norm, block):
        arena.give_back(array)
    arena.take(200)  # in place of both
    arena.take(7)
    assert allocate.sizes == [100, 100, 200, 100]


def test_what_lies_at_either_end_leaves_one_gap() -> None:
    """A bucket that outlived the one before it lay in the middle, and the next had no place."""
    arena = Arena(allocate := Counted(), [100])
    reduced, filled = arena.take(30), arena.take(40)
    arena.give_back(reduced)
    assert arena.fits(60)
    arena.take(60)
    arena.give_back(filled)
    arena.take(40)
    assert allocate.sizes == [100]


def test_places_of_unlike_sizes() -> None:
    """The second has room for a part only; what is larger waits until the first is free."""
    arena = Arena(allocate := Counted(), [100, 60])
    assert arena.fits(100)
    unit = arena.take(90)
    assert not arena.fits(61)
    assert arena.fits(60)
    arena.take(30)
    arena.take(30)
    arena.give_back(unit)
    assert arena.fits(100)
    assert allocate.sizes == [100, 60]


def test_what_is_small_has_the_smaller_place() -> None:
    """It took that of the largest, if it came first, and the largest took another."""
    arena = Arena(allocate := Counted(), [100, 20])
    arena.give_back(arena.take(90))
    pool, head = arena.take(10), arena.take(100)
    assert allocate.sizes == [100, 20]
    arena.give_back(head)
    arena.give_back(pool)
    arena.give_back(arena.take(21))
    assert allocate.sizes == [100, 20]


@pytest.mark.parametrize("dear", [False, True])
def test_no_more_than_is_taken(dear: bool) -> None:
    """As long as it is not known what is taken at once; what is dear is used again."""
    arena = Arena(allocate := Counted(), [100], dear)
    arena.exact = True
    first, tied = arena.take(90), arena.take(5, apart=True)
    arena.give_back(first)
    arena.give_back(arena.take(90))
    second = arena.take(80)  # in place of the first
    assert not arena.fits(1)
    assert sum(chunk.array.size for chunk in arena._chunks) == 85
    arena.give_back(second)
    arena.give_back(tied)
    assert sum(chunk.array.size for chunk in arena._chunks) == (85 if dear else 0)
    assert allocate.sizes == ([90, 5, 80] if dear else [90, 5, 90, 80])


def test_what_stays_long_is_apart() -> None:
    """It would keep the large array from what passes through it."""
    arena = Arena(allocate := Counted(), [100])
    tied = arena.take(5, apart=True)
    for _ in range(3):
        arena.give_back(arena.take(100))
    assert allocate.sizes == [5, 100]
    arena.give_back(tied)
    arena.take(200)  # in place of the one of 100, not of what will be needed again
    assert arena.take(5, apart=True).size == 5
    assert allocate.sizes == [5, 100, 200]
