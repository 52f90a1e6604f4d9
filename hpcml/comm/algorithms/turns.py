"""Long blocks a piece at a time: what a reduction takes beside them does not grow with them.

What has come is combined while it is in the cache, and the next piece is on its way meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from math import ceil
from typing import TypeVar

from hpcml.comm.algorithms.blocks import spans
from hpcml.comm.staging import on_device
from hpcml.comm.transport import Array

T = TypeVar("T")

PIECE = 1 << 20
"""Bytes of a block in a turn: in the cache, and long enough not to count the waits for each other
where ranks share cores. Tests lower it."""
DEVICE_PIECE = 1 << 22
"""The same on a GPU, where messages and sums take longer to start. Not measured yet."""
_PARTS = 4
"""Into so many a piece is cut at most for algorithms that receive from several ranks at once."""
_LINE = 64
_SHORT = 1 << 18
"""Bytes of what comes of a block, up to which it does so at once: more messages cost most there."""


def turns(counts: Sequence[int], like: Array, rows: int = 1) -> Iterator[tuple[slice, list[slice]]]:
    """Cut blocks of `counts` elements side by side into pieces, the n-th of each for the n-th turn.

    Gives where they lie in a block, and among all blocks: nowhere in those that are shorter. One
    turn, of whole blocks, if these are short; none if all are empty. rows: pieces that a rank
    receives in a turn.
    """
    places, step = spans(counts), _step(counts, like, rows)
    for start in range(0, max(counts), step):
        part = slice(start, start + step)
        yield part, [_within(place, part) for place in places]


def longest(own: int, counts: Sequence[int], like: Array, rows: int = 1) -> int:
    """Elements of the longest piece of a block of `own`."""
    return min(own, _step(counts, like, rows))


def count_of(counts: Sequence[int], like: Array, rows: int = 1) -> int:
    """How many turns there are."""
    return -(-max(counts) // _step(counts, like, rows))


def turns_of(nbytes: float, rows: int = 1) -> int:
    """Turns of blocks of so many bytes of the host, for formulas of costs."""
    block = ceil(nbytes)
    return max(1, -(-block // _share(block, rows, device=False)))


def most(block: int, others: int, *, at_once: bool, device: bool) -> int:
    """Bytes of all pieces of a rank that receives a block of so many bytes from each of the others.

    at_once: from all of them in a turn, else from one after the other.
    """
    rows = others if at_once else 1
    piece = min(block, _share(block, rows, device))
    if not piece or not others:
        return 0
    times = -(-block // piece) * (1 if at_once else others)
    return min(times, 2) * piece * rows


def in_turn(make: Callable[[], T], times: int) -> Iterator[T]:
    """Two in turn, one to combine and one that comes; one if it is taken once.

    All are made at once: for a message that is under way when memory is refused nobody would wait.
    """
    return cycle([make() for _ in range(min(times, 2))])


def ahead(started: Iterable[T]) -> Iterator[T]:
    """Give each of what is started one after the other once the next one has been started too."""
    coming = iter(started)
    for before in coming:
        for item in coming:
            yield before
            before = item
        yield before


def _step(counts: Sequence[int], like: Array, rows: int) -> int:
    """Elements of a piece, alike on all ranks."""
    return max(1, _share(max(counts) * like.itemsize, rows, on_device(like)) // like.itemsize)


def _share(block: int, rows: int, device: bool) -> int:
    """Bytes of a piece of a block of so many.

    On the host about a quarter at most of one that is not short, so that two pieces are half of it.
    """
    parts = min(max(rows, 1), _PARTS)
    most = (DEVICE_PIECE if device else PIECE) // parts
    return most if device or block * parts < _SHORT else min(-(-block // (4 * _LINE)) * _LINE, most)


def _within(place: slice, part: slice) -> slice:
    return slice(*(min(place.start + edge, place.stop) for edge in (part.start, part.stop)))
