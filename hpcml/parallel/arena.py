"""Memory for what lives briefly: gathered parameters, and gradients until they are reduced.

ZeRO-R (Rajbhandari et al. 2019, section 6): a few large pieces of memory that are used again and
again, by what is alive at a time, instead of fragments from the system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hpcml.backend import Array


class Arena:
    """Hands out parts of large arrays, where least is left, and makes another where none fits.

    What it does depends on the calls alone, so that ranks which make the same calls get the same
    places, as memory that they share needs it.
    """

    exact = False
    """Whether each part is an array of its own, as long as it is not known what is taken at once:
    little more is held than is taken."""
    short = False
    """Whether more was taken at once than the first arrays are for."""

    def __init__(
        self, allocate: Callable[[int], Array], sizes: Sequence[int] = (), dear: bool = False
    ) -> None:
        """Make one without any memory yet.

        allocate: of a number of elements, makes a flat array. sizes: elements that the first arrays
        have at least; what comes first takes the smallest that it fits. dear: to make an array
        takes long: one that is exact stays until one of another size is made.
        """
        self._allocate, self._sizes, self._dear = allocate, sizes, dear
        self._chunks: list[_Chunk] = []
        self._lent: dict[int, tuple[_Chunk, int, int]] = {}

    def take(self, size: int, apart: bool = False) -> Array:
        """A flat array of `size` elements with any values.

        apart: in memory of its own, for what stays long, and would keep what is large from a place.
        """
        least = min((free for free, _, _ in self._places(size, apart)), default=0)
        planned = 0 if apart else self._planned(size)
        if not least or size <= planned < least:
            if not least:  # the new one takes the place of those that nobody uses
                self._chunks = [chunk for chunk in self._chunks if chunk.taken or chunk.apart]
                planned = 0 if apart else self._planned(size)
            self.short |= not (apart or self.exact or size <= planned)
            self._chunks.append(_Chunk(self._allocate(max(size, planned)), apart, planned))
        _, number, start = min(self._places(size, apart))
        return self._lend(self._chunks[number], start, size)

    def fits(self, size: int) -> bool:
        """Whether there is a place for so much, or will be in one of the first arrays."""
        return not self.exact and (any(self._places(size)) or size <= self._planned(size))

    def spans(self, size: int) -> bool:
        """Whether so much would have a place in the first arrays, were they free."""
        return any(size <= planned for planned in self._sizes)

    def part(self, array: Array, place: slice) -> Array:
        """A part of an array that `take` gave, the same object each time."""
        chunk, start, _ = self._lent[id(array)]
        return chunk.view(start + place.start, start + place.stop)

    def give_back(self, array: Array) -> None:
        """Take back what `take` gave: its values are lost."""
        chunk, start, end = self._lent.pop(id(array))
        chunk.taken.remove((start, end))
        if self.exact and not self._dear:
            self._chunks.remove(chunk)

    def _places(self, size: int, apart: bool = False) -> Iterator[tuple[int, int, int]]:
        """Free elements, number of the chunk and start of each place for `size` elements.

        At the end of an array where that is free and its beginning is not: what lies at either end
        leaves one gap when it is given back, whichever goes first.
        """
        for number, chunk in enumerate(self._chunks):
            if chunk.apart is apart and (not self.exact or chunk.array.size == size):
                for start, end in chunk.gaps():
                    if end - start >= size:
                        at_end = start > 0 and end == chunk.array.size
                        yield end - start, number, end - size if at_end else start

    def _planned(self, size: int) -> int:
        """Elements of that of the first arrays in which to put `size`; 0 if there is none."""
        if self.exact:
            return 0
        coming = list(self._sizes)
        for chunk in self._chunks:
            if chunk.planned:
                coming.remove(chunk.planned)
        return min((one for one in coming if one >= size), default=max(coming, default=0))

    def _lend(self, chunk: _Chunk, start: int, size: int) -> Array:
        end = start + size
        array = chunk.view(start, end)
        chunk.taken.append((start, end))
        chunk.taken.sort()
        self._lent[id(array)] = chunk, start, end
        return array


class _Chunk:
    """An array, and which parts of it are taken."""

    def __init__(self, array: Array, apart: bool, planned: int) -> None:
        self.array, self.apart, self.planned = array, apart, planned
        self.taken: list[tuple[int, int]] = []
        self._views: dict[tuple[int, int], Array] = {}

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Start and end of each part that nobody has."""
        start = 0
        for low, high in [*self.taken, (self.array.size, self.array.size)]:
            yield start, low
            start = high

    def view(self, start: int, end: int) -> Array:
        """A part, the same object each time: collectives know it again."""
        if (start, end) not in self._views:
            self._views[start, end] = self.array[start:end]
        return self._views[start, end]
