"""Memory for what lives briefly: gathered parameters, and gradients until they are reduced.

ZeRO-R (Rajbhandari et al. 2019, section 6): a few large pieces of memory that are used again and
again, by what is alive at a time, instead of fragments from the system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hpcml.backend import Array


class Arena:
    """Hands out parts of large arrays, where least is left, and makes another where none fits.

    What it does depends on the calls alone, so that ranks which make the same calls get the same
    places, as memory that they share needs it.
    """

    def __init__(self, allocate: Callable[[int], Array], number: int = 0, size: int = 0) -> None:
        """Make one without any memory yet.

        allocate: of a number of elements, makes a flat array. The first `number` arrays have `size`
        elements at least.
        """
        self._allocate = allocate
        self._number, self._size = number, size
        self._chunks: list[_Chunk] = []
        self._lent: dict[int, tuple[_Chunk, int, int]] = {}

    def take(self, size: int, apart: bool = False) -> Array:
        """A flat array of `size` elements with any values.

        apart: in memory of its own, for what stays long, and would keep what is large from a place.
        """
        if not any(self._places(size, apart)):
            # The new one takes the place of smaller ones that nobody uses.
            self._chunks = [chunk for chunk in self._chunks if chunk.taken or chunk.apart]
            more = 0 if apart or not self._is_of_first() else self._size
            self._chunks.append(_Chunk(self._allocate(max(size, more)), apart))
        _, number, start = min(self._places(size, apart))
        return self._lend(self._chunks[number], start, size)

    def fits(self, size: int) -> bool:
        """Whether there is a place for so much, or will be in one of the first arrays."""
        return any(self._places(size)) or self._is_of_first()

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

    def _places(self, size: int, apart: bool = False) -> Iterator[tuple[int, int, int]]:
        """Free elements, number of the chunk and start of each place for `size` elements."""
        for number, chunk in enumerate(self._chunks):
            if chunk.apart is apart:
                for free, start in chunk.gaps():
                    if free >= size:
                        yield free, number, start

    def _is_of_first(self) -> bool:
        return sum(not chunk.apart for chunk in self._chunks) < self._number

    def _lend(self, chunk: _Chunk, start: int, size: int) -> Array:
        end = start + size
        array = chunk.view(start, end)
        chunk.taken.append((start, end))
        chunk.taken.sort()
        self._lent[id(array)] = chunk, start, end
        return array


class _Chunk:
    """An array, and which parts of it are taken."""

    def __init__(self, array: Array, apart: bool) -> None:
        self.array, self.apart = array, apart
        self.taken: list[tuple[int, int]] = []
        self._views: dict[tuple[int, int], Array] = {}

    def gaps(self) -> Iterator[tuple[int, int]]:
        """How many elements are free and where they begin, of each part that nobody has."""
        start = 0
        for low, high in [*self.taken, (self.array.size, self.array.size)]:
            yield low - start, start
            start = high

    def view(self, start: int, end: int) -> Array:
        """A part, the same object each time: collectives know it again."""
        if (start, end) not in self._views:
            self._views[start, end] = self.array[start:end]
        return self._views[start, end]
