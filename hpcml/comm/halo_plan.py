"""Which cells go from rank to rank in a halo exchange: arithmetic alone, no communication."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from numbers import Integral
from typing import Any

import numpy as np

Slices = tuple[slice, ...]
"""A box of cells: a slice for each dim that is cut."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How one dim of a global array is cut along an axis of a mesh, and the ghosts that are wanted.

    Raises `ValueError` when it is used with an axis that does not fit.
    """

    axis: str | tuple[str, ...]
    """The mesh axis whose ranks hold the blocks; several are one, in the order of the mesh."""
    size: int | Sequence[int]
    """Cells of the global array, cut as evenly as possible (the first ranks get one more), or the
    cells of each rank's block. Blocks may be empty."""
    width: int | Pair | Sequence[Pair] = 1
    """Ghosts on each side; (before, after); or such a pair for each rank. Any width: ghosts may
    come from several ranks, or from as many turns around a periodic dim."""
    periodic: bool = False
    """Whether the last cell is followed by the first."""

    def line(self, ranks: int) -> Line:
        """The blocks and widths of each of the ranks along the axis."""
        size: Any = self.size
        blocks = even(int(size), ranks) if isinstance(size, Integral) else tuple(size)
        width: Any = self.width
        if isinstance(width, Integral):
            width = (width, width)
        widths = (width,) * ranks if _is_width(width) else tuple(width)
        if len(blocks) != ranks or min(blocks) < 0:
            raise ValueError(
                f"size={self.size} along {self.axis}: give the size of the whole, or blocks of 0 "
                f"or more cells for {ranks} rank(s)"
            )
        if len(widths) != ranks or not all(_is_width(width) for width in widths):
            raise ValueError(
                f"width={self.width} along {self.axis}: give 0 or more ghosts, (before, after), or "
                f"such a pair for each of {ranks} rank(s)"
            )
        return Line(blocks, widths, self.periodic)


def _is_width(width: Any) -> bool:
    """Whether this is one pair of numbers of ghosts."""
    if isinstance(width, Integral) or len(width) != 2:
        return False
    return all(isinstance(side, Integral) and int(side) >= 0 for side in width)


def even(size: int, ranks: int) -> tuple[int, ...]:
    """Blocks of `size` cells, as even as possible: the first ones have one more."""
    least, more = divmod(size, ranks)
    return tuple(least + (rank < more) for rank in range(ranks))


@dataclass(frozen=True)
class Piece:
    """Neighbouring cells along one dim that a rank wants and one rank (it may be itself) owns."""

    owner: int
    source: slice
    """Where they are in the owner's block."""
    target: slice
    """Where they come to in the result, the block with its ghosts."""


@dataclass(frozen=True)
class Line:
    """One dim: the blocks of the ranks side by side, and the ghosts that each wants around its own.

    Periodic or not, a rank's result covers the global cells from `before` cells before its block to
    `after` behind it.
    """

    blocks: tuple[int, ...]
    widths: tuple[Pair, ...]
    periodic: bool = False

    def padded(self, rank: int) -> int:
        """Cells of the rank's block with its ghosts."""
        return self.blocks[rank] + sum(self.widths[rank])

    def inside(self, rank: int) -> slice:
        """Where the rank's block lies among them."""
        before = self.widths[rank][0]
        return slice(before, before + self.blocks[rank])

    def pieces(self, rank: int) -> list[Piece]:
        """What the rank wants, in the order in which it lies in the result."""
        starts = [0, *accumulate(self.blocks)]
        extent = starts.pop()
        first = starts[rank] - self.widths[rank][0]
        last = first + self.padded(rank)
        turns = range(first // extent, -(-last // extent)) if self.periodic and extent else [0]
        found = []
        for turn in turns:
            for owner, block in enumerate(self.blocks):
                start = starts[owner] + turn * extent
                low, high = max(start, first), min(start + block, last)
                if low < high:
                    source = slice(low - start, high - start)
                    found.append(Piece(owner, source, slice(low - first, high - first)))
        return found

    def gaps(self, rank: int) -> list[slice]:
        """What of the result nobody owns: the ghosts beyond the ends of the global array."""
        pieces = self.pieces(rank)
        whole = self.padded(rank)
        ends = (pieces[0].target.start, pieces[-1].target.stop) if pieces else (whole, whole)
        return [gap for gap in (slice(0, ends[0]), slice(ends[1], whole)) if gap.start < gap.stop]


class Plan:
    """What one rank of a grid of ranks sends, receives and keeps.

    `block`, `padded`: cells of this rank's block, and with its ghosts, by dim. `inside`: where the
    block lies among the latter. `sends`: by rank, boxes of the block that are ghosts there.
    `receives`: by rank, boxes of the result that are owned there. Both list a pair's boxes in the
    same order, and the ranks in theirs. `wraps`: ghosts that this rank owns itself, around a
    periodic dim, as boxes of the block and of the result. `gaps`: boxes of the result that cover
    exactly what lies beyond the global array.
    """

    def __init__(self, lines: Sequence[Line], ranks: np.ndarray[Any, Any], rank: int) -> None:
        """Plan for `rank` of the grid `ranks`: the rank at each place along the lines."""
        here = [int(place) for place in np.argwhere(ranks == rank)[0]]
        cuts = list(zip(lines, here, strict=True))
        self.block = tuple(line.blocks[place] for line, place in cuts)
        self.padded = tuple(line.padded(place) for line, place in cuts)
        self.inside: Slices = tuple(line.inside(place) for line, place in cuts)
        self.gaps: list[Slices] = [
            (*(slice(None),) * dim, gap, *(slice(None),) * (len(cuts) - dim - 1))
            for dim, (line, place) in enumerate(cuts)
            for gap in line.gaps(place)
        ]
        wanted = [[(piece.owner, piece) for piece in line.pieces(place)] for line, place in cuts]
        owned = [list(_owned(line, place)) for line, place in cuts]
        receives = _boxes(wanted, ranks)
        sends = _boxes(owned, ranks)
        self.wraps = [box for box in receives.pop(rank, []) if box[1] != self.inside]
        sends.pop(rank, None)
        self.receives = {peer: [box[1] for box in receives[peer]] for peer in sorted(receives)}
        self.sends = {peer: [box[0] for box in sends[peer]] for peer in sorted(sends)}


def _owned(line: Line, owner: int) -> Iterator[tuple[int, Piece]]:
    """What the ranks along the line want of this one."""
    for rank in range(len(line.blocks)):
        for piece in line.pieces(rank):
            if piece.owner == owner:
                yield rank, piece


def _boxes(
    pieces: list[list[tuple[int, Piece]]], ranks: np.ndarray[Any, Any]
) -> dict[int, list[tuple[Slices, Slices]]]:
    """Boxes (source, target) by the rank on the other side: every choice of a piece in each dim."""
    found: dict[int, list[tuple[Slices, Slices]]] = {}
    for choice in product(*pieces):
        peer = int(ranks[tuple(place for place, _ in choice)])
        source = tuple(piece.source for _, piece in choice)
        target = tuple(piece.target for _, piece in choice)
        found.setdefault(peer, []).append((source, target))
    return found
