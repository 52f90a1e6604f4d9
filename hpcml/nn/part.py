"""Which part of a tensor a rank holds, where the ranks of an axis divide it along one dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from hpcml.backend import Array

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Some ranges of a tensor along one dimension, one after the other.

    shape: of the whole. ranges: (first, end) along `dim`, in increasing order.
    """

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[Range, ...]

    @property
    def own(self) -> tuple[int, ...]:
        """Shape of the part."""
        size = sum(end - first for first, end in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @property
    def index(self) -> tuple[slice | list[int], ...]:
        """What gives the part of an array of the whole tensor, and its place there."""
        places = [i for first, end in self.ranges for i in range(first, end)]
        return (*(slice(None),) * self.dim, places)

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Where each range lies: (index in the part, index in the whole)."""
        before, place = (slice(None),) * self.dim, 0
        for first, end in self.ranges:
            yield (*before, slice(place, place + end - first)), (*before, slice(first, end))
            place += end - first

    def take(self, whole: Array, out: Array) -> None:
        """Copy the part of a whole array into `out`."""
        for here, there in self.pieces():
            out[here] = whole[there]

    def put(self, own: Array, whole: Array) -> None:
        """Copy the part into its place in the whole."""
        for here, there in self.pieces():
            whole[there] = own[here]

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where `count` elements of the flattened part, from `start` on, lie in the whole.

        Gives (place among those elements, first element of the flattened whole, how many) for each
        run of neighbours.
        """
        inner = prod(self.shape[self.dim + 1 :])
        row, whole = prod(self.own[self.dim :]), prod(self.shape[self.dim :])
        stop, place = start + count, start
        while place < stop:
            outer, within = divmod(place, row)
            for first, end in self.ranges:
                length = (end - first) * inner
                if within < length:
                    run = min(length - within, stop - place)
                    yield place - start, outer * whole + first * inner + within, run
                    place += run
                    break
                within -= length


def blocks(n: int, ranks: int) -> list[Range]:
    """Cut n rows into blocks, one for each rank, the first ones larger where n does not divide."""
    sizes = [n // ranks + (rank < n % ranks) for rank in range(ranks)]
    ends = [sum(sizes[: rank + 1]) for rank in range(ranks)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
