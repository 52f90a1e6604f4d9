"""Which positions of a sequence a rank computes.

Two axes divide sequences. Context parallelism gives each rank some positions for the whole of the
model. Sequence parallelism (Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models", section 4.2.2) cuts these once more among the tensor-parallel ranks, where
these would compute the same: between the pairs of column- and row-parallel layers. Activations have
the sequence along their last dim but one, (..., T, width).
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcml import collectives
from hpcml.autograd import Tensor, cat
from hpcml.backend import Array, xp
from hpcml.comm import Axis
from hpcml.nn.part import Part, Range, blocks
from hpcml.parallel.context import zigzag

Features = tuple[int, tuple[Range, ...]]


class Positions:
    """Ways into, out of and between the regions in which the ranks of `tp` divide features.

    sequence_parallel: between the regions each of these ranks has some positions only. overlap:
    these then travel beside the products of linear layers (`hpcml.parallel.tensor.overlap`); None:
    where that gains (`Axis.overlaps`). cp: the context-parallel ranks. The layer that takes the
    tokens says how long they are (`begin`).
    """

    def __init__(
        self,
        tp: Axis,
        cp: Axis | None = None,
        *,
        sequence_parallel: bool,
        overlap: bool | None = None,
    ) -> None:
        self.tp = tp
        self.cp = Axis("cp") if cp is None else cp
        self.cuts = sequence_parallel and tp.size > 1
        self.overlaps = self.cuts and (tp.overlaps if overlap is None else overlap)
        self.length = 0
        self.features: Features | None = None
        """Of the region under way: how many there are, and which this rank has; None between."""
        self.dim = -1
        """Along which they lie."""
        self.ended = 0  # outputs in this pass

    @property
    def divided(self) -> bool:
        """Whether a rank has some positions only, anywhere."""
        return self.cuts or self.cp.size > 1

    def begin(self, length: int) -> None:
        """A pass through the model begins, with sequences of so many positions."""
        self.length = length

    @property
    def context(self) -> tuple[Range, ...]:
        """The positions of this rank within the regions."""
        return _filled(zigzag(self.length, self.cp.size)[self.cp.rank])

    @property
    def counts(self) -> list[int]:
        """How many of these each tensor-parallel rank has between the regions."""
        held = sum(end - first for first, end in self.context)
        return [end - first for first, end in blocks(held, self.tp.size)]

    @property
    def own(self) -> tuple[Range, ...]:
        """The positions of this rank between the regions."""
        if not self.cuts:
            return self.context
        counts = self.counts
        start = sum(counts[: self.tp.rank])
        return _within(self.context, start, start + counts[self.tp.rank])

    def part(self, shape: Sequence[int]) -> Part:
        """What an activation of this shape, between the regions, is of the whole."""
        whole = (*shape[:-2], self.length, shape[-1])
        return Part(whole, len(whole) - 2, self.own)

    def begin_region(self, count: int, own: tuple[Range, ...], dim: int = -1) -> None:
        """From here on a rank has some of so many features, along `dim`."""
        self.features, self.dim = (count, own), dim

    def called(self, own: int) -> str:
        """What errors call features that came, `own` to this rank: alike on all ranks."""
        return f"all {own}" if self.features is None else f"a part of {self.features[0]}"

    # --- ways of activations --------------------------------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """Into a region: each rank then makes its own use of all positions (Megatron's f, or g)."""
        if self.cuts:
            return collectives.all_gather(x, self.tp, -2, to="R", counts=self.counts)
        return collectives.copy(x, self.tp)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a region: sum the parts that the ranks have (Megatron's g, or its converse)."""
        self.features = None
        if self.cuts:
            return collectives.reduce_scatter(x, self.tp, -2, counts=self.counts)
        return collectives.all_reduce(x, self.tp, to="I")

    def join(self, x: Tensor) -> Tensor:
        """All positions of outputs within a region, in order: (..., T, width), invariant on cp."""
        if self.cp.size == 1:
            return x
        ranges = zigzag(self.length, self.cp.size)
        counts = [sum(end - first for first, end in of_rank) for of_rank in ranges]
        whole = collectives.all_gather(x, self.cp, -2, to="I", counts=counts)
        place, pieces = 0, {}
        for first, end in (one for of_rank in ranges for one in of_rank):
            if first < end:
                pieces[first] = whole[..., place : place + end - first, :]
                place += end - first
        return cat([pieces[first] for first in sorted(pieces)], -2)


def pick(x: Array, ranges: Sequence[Range], dim: int = -1) -> Array:
    """Some ranges of an array along a dim, one after the other."""
    part = Part(x.shape, dim % x.ndim, tuple(ranges))
    found = [x[there] for _, there in part.pieces()]
    return found[0] if len(found) == 1 else xp(x).concatenate([x[..., :0], *found], dim)


def _filled(ranges: Sequence[Range]) -> tuple[Range, ...]:
    return tuple((first, end) for first, end in ranges if first < end)


def _within(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """Of ranges one after the other, those of the elements start to stop."""
    found, place = [], 0
    for first, end in ranges:
        low, high = max(start - place, 0), min(stop - place, end - first)
        if low < high:
            found.append((first + low, first + high))
        place += end - first
    return tuple(found)
