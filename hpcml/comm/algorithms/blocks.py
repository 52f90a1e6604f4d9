"""How buffers are cut and ranks are paired: what several algorithms share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from hpcml.comm.link import Link


def shares(count: int, parts: int) -> tuple[int, ...]:
    """`count` elements in `parts` blocks that differ by one at most, the larger ones first."""
    least, more = divmod(count, parts)
    return (least + 1,) * more + (least,) * (parts - more)


def starts(counts: Sequence[int]) -> list[int]:
    """Where blocks of `counts` elements side by side begin, and where the last one ends."""
    return list(accumulate(counts, initial=0))


def spans(counts: Sequence[int]) -> list[slice]:
    """The places of such blocks."""
    edges = starts(counts)
    return [slice(*pair) for pair in pairwise(edges)]


def rounds(size: int) -> int:
    """ceil(log2 size): rounds in which what one rank has can come to all."""
    return (size - 1).bit_length()


def is_power(size: int) -> bool:
    """Whether this is a power of two."""
    return size & (size - 1) == 0


class Cores:
    """The largest power of two of the ranks: the cores, among which halving and doubling works.

    The ranks that are too many stand behind a core each: rank 1 behind rank 0, rank 3 behind 2, and
    so on, so that the blocks of a core and of the rank behind it lie side by side
    (Rabenseifner and Träff 2004, "More Efficient Reduction Algorithms for Non-Power-of-Two Number
    of Processors in Message-Passing Parallel Systems").
    """

    def __init__(self, link: Link) -> None:
        """The part of this rank of the link."""
        self.count = 1 << (link.size.bit_length() - 1)
        self._spare = link.size - self.count
        self.front: int | None = None
        """The core before this rank, which is no core itself."""
        self.behind: int | None = None
        """The rank behind this core."""
        self.index = link.rank - self._spare
        """Number of this core among the cores."""
        if link.rank < 2 * self._spare:
            self.index = link.rank // 2
            if link.rank % 2:
                self.front = link.rank - 1
            else:
                self.behind = link.rank + 1

    def rank(self, index: int) -> int:
        """The rank of a core; also where the blocks of the cores before it end."""
        return index + min(index, self._spare)


Branch = tuple[int, int, int, int]
"""(holder, other, low, high): `holder` has the blocks of a range of ranks that contains it, and
`other` is the rank that takes, or gives, those from `low` to `high`."""


def branches(link: Link, root: int) -> Iterator[Branch]:
    """The way from the root to this rank in a tree of depth ceil(log2 p), and on from this rank.

    The range of ranks is halved at every branching: the rank that stands for it keeps the half in
    which it lies, and the first rank of the other half stands for that. So every message carries
    blocks that lie side by side, whatever the root and the number of ranks, which the usual
    binomial tree (ranks counted from the root) gives only for root 0.
    """
    low, high, holder = 0, link.size, root
    while high - low > 1:
        middle = (low + high + 1) // 2
        far = (middle, high) if holder < middle else (low, middle)
        near = (low, middle) if holder < middle else (middle, high)
        yield holder, far[0], *far
        if far[0] <= link.rank < far[1]:
            (low, high), holder = far, far[0]
        else:
            low, high = near
