"""Memory that is used again by what is alive at a time."""

from __future__ import annotations

import numpy as np

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
