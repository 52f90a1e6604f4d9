"""An array that is cut along one dim over the ranks of an axis: shapes, places, order in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hpcml import memory
from hpcml.backend import Array, kind
from hpcml.comm.axis import Axis


@dataclass(frozen=True)
class Shards:
    """How one dim is cut along an axis. The whole is an array of the blocks of all ranks joined."""

    axis: Axis
    dim: int
    counts: tuple[int, ...]
    """Size of each rank's block along the dim."""

    @staticmethod
    def of(
        name: str,
        shape: tuple[int, ...],
        axis: Axis,
        dim: int,
        counts: Sequence[int] | None,
        *,
        whole: bool,
    ) -> Shards:
        """The cut of an array of this shape, which is the whole or else this rank's block.

        Without `counts` all blocks are equal. Raises `ValueError`, in the name of the operation
        `name`, if the array cannot be cut so.
        """
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"{name}: dim={dim} of shape {shape}: there is no such dim")
        dim %= len(shape)
        size, n = axis.size, shape[dim]
        if counts is None:
            if whole and n % size:
                raise ValueError(
                    f"{name}: dim {dim} of shape {shape} cannot be cut into {size} equal blocks: "
                    f"pad it to {-(-n // size) * size} or give the counts"
                )
            return Shards(axis, dim, (n // size if whole else n,) * size)
        if len(counts) != size or min(counts) < 0:
            raise ValueError(
                f"{name}: counts={list(counts)}: give 0 or more for each of {size} ranks"
            )
        expected = sum(counts) if whole else counts[axis.rank]
        if n != expected:
            raise ValueError(
                f"{name}: counts={list(counts)} take {expected} along dim {dim} of rank "
                f"{axis.rank}, but the shape is {shape}"
            )
        return Shards(axis, dim, tuple(counts))

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole, of which a block has this shape."""
        return (*shape[: self.dim], sum(self.counts), *shape[self.dim + 1 :])

    def own(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's block of a whole of this shape."""
        return (*shape[: self.dim], self.counts[self.axis.rank], *shape[self.dim + 1 :])

    def elements(self, shape: tuple[int, ...]) -> list[int]:
        """Elements of each rank's block of an array of this shape."""
        across = prod(shape[: self.dim]) * prod(shape[self.dim + 1 :])
        return [count * across for count in self.counts]

    def index(self, rank: int) -> tuple[slice, ...]:
        """Where a rank's block lies in the whole."""
        start = sum(self.counts[:rank])
        return (*(slice(None),) * self.dim, slice(start, start + self.counts[rank]))

    def in_order(self, x: Array) -> Array:
        """The blocks of the whole `x` one after the other: itself, if they lie there so."""
        flat = self.room(x)
        if self._scattered(x):
            for block, place in self._places(x, flat):
                place[...] = block
        return flat

    def room(self, x: Array) -> Array:
        """Where the blocks of the whole `x` are to come: itself, if they lie there in order."""
        return new((x.size,), x.dtype, x, "buffers") if self._scattered(x) else x.reshape(-1)

    def join(self, flat: Array, x: Array) -> None:
        """Put blocks that have come into `room(x)` into the whole `x`."""
        if self._scattered(x):
            for block, place in self._places(x, flat):
                block[...] = place

    def _scattered(self, x: Array) -> bool:
        """Whether blocks of the whole `x` lie in memory in more than one piece each."""
        lead: int = prod(x.shape[: self.dim])
        return lead > 1

    def _places(self, x: Array, flat: Array) -> Iterator[tuple[Array, Array]]:
        """Each rank's block in the whole `x`, and its place in `flat`."""
        start = 0
        for rank in range(len(self.counts)):
            block = x[self.index(rank)]
            yield block, flat[start : start + block.size].reshape(block.shape)
            start += block.size


def new(shape: tuple[int, ...], dtype: Any, like: Array, category: str | None = None) -> Array:
    """An uninitialised array on the device of `like`, counted in `category`."""
    return memory.empty(shape, dtype, category, kind(like))
