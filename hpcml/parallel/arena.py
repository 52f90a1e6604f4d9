"""Memory for what lives briefly: gathered parameters, and gradients until they are reduced.

ZeRO-R (Rajbhandari et al. 2019, section 6): a few large pieces of memory that are used again and
again, by what is alive at a time, instead of fragments from the system.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcml.backend import Array

_LARGER = 4
"""A chunk at most so many times as large is not too large for something: the largest bucket of a
unit may well be more than twice as large as what is left of the unit."""


class Arena:
    """Hands out parts of large arrays, the first that fits, and makes another where none does.

    What it does depends on the calls alone, so that ranks which make the same calls get the same
    places, as memory that they share needs it.
    """

    def __init__(self, allocate: Callable[[int], Array]) -> None:
        """`allocate(size)`: makes a flat array."""
        self._allocate = allocate
        self._chunks: list[_Chunk] = []
        self._lent: dict[int, tuple[_Chunk, int, int]] = {}

    def take(self, size: int) -> Array:
        """A flat array of `size` elements with any values."""
        place = self._free(size)
        if place is None:
            # A new chunk takes the place of a somewhat smaller one that nobody uses.
            self._chunks = [
                chunk for chunk in self._chunks
                if chunk.taken or not chunk.array.size < size <= _LARGER * chunk.array.size
            ]  # fmt: skip
            self._chunks.append(_Chunk(self._allocate(size)))
            place = self._chunks[-1], 0
        return self._lend(*place, size)

    def part(self, array: Array, place: slice) -> Array:
        """A part of an array that `take` gave, the same object each time."""
        chunk, start, _ = self._lent[id(array)]
        return chunk.view(start + place.start, start + place.stop)

    def give_back(self, array: Array) -> None:
        """Take back what `take` gave: its values are lost."""
        chunk, start, end = self._lent.pop(id(array))
        chunk.taken.remove((start, end))

    def shrink(self) -> None:
        """Let go of the arrays of which no part is lent."""
        self._chunks = [chunk for chunk in self._chunks if chunk.taken]

    def _free(self, size: int) -> tuple[_Chunk, int] | None:
        """The first place for `size` elements, if there is one."""
        for chunk in self._chunks:
            # Not in a much larger one: something small that stays would keep all of it.
            start = chunk.find(size) if _LARGER * size >= chunk.array.size else None
            if start is not None:
                return chunk, start
        return None

    def _lend(self, chunk: _Chunk, start: int, size: int) -> Array:
        end = start + size
        array = chunk.view(start, end)
        chunk.taken.append((start, end))
        chunk.taken.sort()
        self._lent[id(array)] = chunk, start, end
        return array


class _Chunk:
    """An array, and which parts of it are taken."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.taken: list[tuple[int, int]] = []
        self._views: dict[tuple[int, int], Array] = {}

    def find(self, size: int) -> int | None:
        """Where `size` elements are free, first."""
        start = 0
        for low, high in self.taken:
            if low - start >= size:
                return start
            start = high
        return start if self.array.size - start >= size else None

    def view(self, start: int, end: int) -> Array:
        """A part, the same object each time: collectives know it again."""
        if (start, end) not in self._views:
            self._views[start, end] = self.array[start:end]
        return self._views[start, end]
