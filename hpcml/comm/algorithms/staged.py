"""Collectives on ordinary memory by way of memory that the ranks of a node share.

A chunk at a time: all ranks copy theirs into shared memory, meet, and take what they need straight
from the memory of all. Reductions combine in the order of the ranks. The cost of a meeting is
alpha, that of a byte read and written within the cache gamma; the formulas are our own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hpcml.backend import is_half
from hpcml.comm.algorithms.blocks import shares, spans
from hpcml.comm.algorithms.registry import Machine, Situation, algorithm
from hpcml.comm.fold import adds_floats, fold_of
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array

_WHOLE = 1 << 14
"""Bytes up to which every rank of many combines all of a chunk: cheaper than to meet once more."""
_LINE = 64
_CUTS = 256
"""Lists of counts whose blocks' edges are remembered."""


def _shared(situation: Situation) -> bool:
    return situation.shared


def _shared_even(situation: Situation) -> bool:
    return situation.shared and situation.even


def _prepare(link: Link, dtype: np.dtype[Any]) -> None:
    """Load the kernels: to compile them may take longer than ranks wait for each other."""
    link.scratch().prepare(dtype)


def _cost(n: int, p: int, m: Machine) -> float:
    return 2 * m.alpha + 4 * n * m.gamma


@algorithm("allreduce", "staged", cost=_cost, ordered=True, applies=_shared, prepare=_prepare)
def allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Each rank combines a slice of the chunk, then fetches those of the others.

    Two of them, or for a few bytes, each combine all of it. 2 alpha + 4 n gamma.
    """
    if adds_floats(reduction, out.dtype):
        whole = link.size == 2 or out.nbytes <= _WHOLE
        link.scratch().sum(x, out, whole, reduction.onto)
        link.count_local(x.nbytes if whole else x.nbytes + x.nbytes // link.size)
        return
    stage = _Stage(link, out)
    fold = fold_of(reduction, out.dtype)
    source, target = stage.words(x), stage.words(out)
    for part, first in stage.turns(x.size):
        n = part.stop - part.start
        stage.mine[first : first + n] = source[part]
        link.count_local(n * out.itemsize)
        stage.meet()
        here = target[part]
        if link.size == 2 or n * out.itemsize <= _WHOLE:
            fold(stage.rows, here[None], 0, first, first + n, first)
            continue
        blocks = spans([count * _LINE for count in shares(-(-n // _LINE), link.size)])
        own = slice(min(blocks[link.rank].start, n), min(blocks[link.rank].stop, n))
        fold(stage.rows, here[None], 0, first + own.start, first + own.stop, first)
        stage.mine[first + own.start : first + own.stop] = here[own]
        link.count_local(here[own].nbytes)
        stage.meet()
        for step in range(1, link.size):
            other = (link.rank + step) % link.size
            block = slice(min(blocks[other].start, n), min(blocks[other].stop, n))
            here[block] = stage.rows[other, first + block.start : first + block.stop]


@algorithm("reduce_scatter", "staged", cost=_cost, ordered=True, applies=_shared, prepare=_prepare)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """Each rank combines its block of the chunk. alpha + 2 n gamma."""
    link.count_local(x.nbytes - out.nbytes)
    if adds_floats(reduction, out.dtype):
        link.scratch().scatter(*_cut(tuple(counts)), x, out, reduction.onto)
        return
    stage = _Stage(link, out, blocks=link.size)
    fold = fold_of(reduction, out.dtype)
    source, target = stage.words(x), stage.words(out)
    for part, first in stage.turns(max(counts)):
        for block, start in zip(spans(counts), stage.starts(first), strict=True):
            piece = source[block][part]
            stage.mine[start : start + piece.size] = piece
        stage.meet()
        here = target[part]
        start = stage.starts(first)[link.rank]
        fold(stage.rows, here[None], 0, start, start + here.size, start)


@algorithm("allgather", "staged", cost=_cost, applies=_shared, prepare=_prepare)
def allgather(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """Each rank copies its block of the chunk to shared memory and fetches the others'.

    alpha + 2 n gamma.
    """
    if out.dtype.char in "fd":
        link.scratch().gather(*_cut(tuple(counts)), x, out)
        link.count_local(x.nbytes)
        return
    stage = _Stage(link, out)
    source, target = stage.words(x), stage.words(out)
    blocks = spans(counts)
    for part, first in stage.turns(max(counts)):
        piece = source[part]
        stage.mine[first : first + piece.size] = piece
        link.count_local(piece.nbytes)
        stage.meet()
        for step in range(link.size):
            other = (link.rank + step) % link.size
            here = target[blocks[other]][part]
            np.copyto(here, stage.rows[other, first : first + here.size] if step else piece)


@algorithm("broadcast", "staged", cost=_cost, applies=_shared)
def broadcast(link: Link, x: Array, root: int) -> None:
    """The root copies chunks to shared memory, the others fetch them. alpha + 2 n gamma."""
    stage = _Stage(link, x)
    buffer = stage.words(x)
    for part, first in stage.turns(x.size):
        here = buffer[part]
        if link.rank == root:
            stage.mine[first : first + here.size] = here
            link.count_local(here.nbytes)
        stage.meet()
        if link.rank != root:
            here[...] = stage.rows[root, first : first + here.size]


@algorithm("alltoall", "staged", cost=_cost, applies=_shared_even)
def alltoall(
    link: Link, x: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
) -> None:
    """As an all-gather, of which each rank fetches its own blocks alone. alpha + 2 n gamma."""
    link.count_local(x.nbytes - sends[link.rank] * x.itemsize)
    stage = _Stage(link, out, blocks=link.size)
    source, target = stage.words(x), stage.words(out)
    for part, first in stage.turns(max(sends)):
        starts = stage.starts(first)
        for block, start in zip(spans(sends), starts, strict=True):
            piece = source[block][part]
            stage.mine[start : start + piece.size] = piece
        stage.meet()
        for step in range(link.size):
            other = (link.rank + step) % link.size
            here = target[spans(receives)[other]][part]
            start = starts[link.rank]
            here[...] = stage.rows[other, start : start + here.size]


@functools.lru_cache(_CUTS)
def _cut(counts: tuple[int, ...]) -> tuple[Array, int]:
    """Where blocks of so many elements begin, with the end of the last; the longest."""
    return np.array([0, *np.cumsum(counts)], np.int64), max(counts)


class _Stage:
    """The shared memory of a link, for elements of the type of an array."""

    def __init__(self, link: Link, like: Array, blocks: int = 1) -> None:
        """`blocks`: pieces of equal room, for so many ranks, in each turn."""
        scratch = link.scratch()
        assert scratch is not None, "an algorithm for shared memory where there is none"
        self.rows = scratch.rows(like.dtype)
        self.mine: Any = self.rows[link.rank]
        self.meet = scratch.meet
        self._scratch, self._itemsize, self._blocks = scratch, like.itemsize, blocks
        self.room = scratch.room(like.itemsize) // blocks
        self._half = is_half(like.dtype)

    def words(self, x: Array) -> Array:
        """The array as the rows have it: 16-bit floats as uint16."""
        return x.view(np.uint16) if self._half else x

    def turns(self, count: int) -> Iterator[tuple[slice, int]]:
        """The parts of `count` elements in turn, each with its first column in the rows."""
        for start in range(0, count, self.room):
            yield slice(start, min(start + self.room, count)), self._scratch.turn(self._itemsize)

    def starts(self, first: int) -> list[int]:
        """The columns at which the pieces of a turn begin."""
        return [first + block * self.room for block in range(self._blocks)]
