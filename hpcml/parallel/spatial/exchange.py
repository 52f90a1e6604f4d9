"""What a layer reads beyond a rank's block: ghosts exchanged, and what is not needed left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hpcml import collectives, memory
from hpcml.autograd import Tensor, saved_tensors_hooks
from hpcml.autograd.ops.images import channels_first, channels_last
from hpcml.autograd.record import empty
from hpcml.backend import Array
from hpcml.comm import Halo, Mesh
from hpcml.comm.halo_plan import Cut
from hpcml.nn.part import Range, blocks
from hpcml.parallel.packing import Packed

Ranges = Sequence[Sequence[Range]]


class Exchange:
    """From blocks of images of some sizes to what each rank reads of them.

    reads: along each dimension the range (first, end) that each rank reads, counted in the whole;
    beyond its ends only if `periodic`. What a rank has and does not read is cut off.

    Layout: S -> S of these ranges; adjoint: gradients of ghosts go back to their owners and are
    added (`collectives.halo_exchange`).
    """

    def __init__(
        self, mesh: Mesh, names: Sequence[str], sizes: Sequence[int], reads: Ranges, periodic: bool
    ) -> None:
        """names: of the axis that cuts each dimension. Local.

        moves: whether any rank reads what another has. whole: whether this one reads all it has.
        """
        dims = len(sizes)
        cuts: dict[int, Cut] = {}
        self._kept, self.whole, self.moves = [], True, False
        for dim, (name, n, ranges) in enumerate(zip(names, sizes, reads, strict=True)):
            axis = mesh[name]
            own = blocks(n, axis.size)
            widths = [
                (max(block[0] - first, 0), max(end - block[1], 0))
                for block, (first, end) in zip(own, ranges, strict=True)
            ]
            cuts[dim - dims - 1] = Cut(name, n, width=widths, periodic=periodic)
            (low, high), (first, end) = own[axis.rank], ranges[axis.rank]
            start = max(first - low, 0)
            self._kept.append(slice(start, start + end - first))
            self.whole = self.whole and first <= low and end >= high
            self.moves = self.moves or any(map(max, widths))
        self.halo = Halo(mesh, cuts)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, C, *S), a block -> (N, C, *S'), what this rank reads, channels last in memory."""
        if self.moves:
            dims = x.ndim - 2
            last = x.permute(0, *range(2, x.ndim), 1)
            wide = collectives.halo_exchange(last, self.halo)
            x = wide.permute(0, dims + 1, *range(1, dims + 1))
        return x if self.whole else x[(slice(None), slice(None), *self._kept)]

    @contextmanager
    def saving(self, block: Tensor, read: Tensor) -> Iterator[None]:
        """Within, what is saved of `read` is kept as the block, which others save too, and a rim.

        Without this, every convolution would keep a copy of the block that it surrounds.
        """
        if read is block or not self.whole:
            yield
            return

        def pack(array: Array) -> Array | Packed:
            return _Rim.of(array, block.data, self.halo) if array is read.data else array

        def unpack(value: Array | Packed) -> Array:
            return value.get() if isinstance(value, Packed) else value

        with saved_tensors_hooks(pack, unpack):
            yield

    @property
    def messages(self) -> int:
        """How many other ranks send ghosts to this one."""
        return len(self.halo.plan.receives)

    @property
    def ghosts(self) -> int:
        """Places of the image that this rank gets from others."""
        padded, block = self.halo.plan.padded, self.halo.plan.block
        return _volume(padded) - _volume(block)


def _volume(sizes: Sequence[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


@dataclass(frozen=True)
class _Rim(Packed):
    """A block with its ghosts, as the block and the slabs around it."""

    block: Array
    slabs: tuple[Array, ...]
    halo: Halo

    @staticmethod
    def of(array: Array, block: Array, halo: Halo) -> _Rim:
        """Copy the ghosts of an array (N, C, *S), of which `block` lies inside."""
        last = array.transpose(0, *range(2, array.ndim), 1)
        return _Rim(block, tuple(_copy(last[index]) for index in slabs(halo)), halo)

    def get(self) -> Array:
        """The array again, channels last."""
        last = channels_last(self.block)
        with memory.category("buffers"):
            whole = empty(self.halo.padded(last.shape), last)
        whole[self.halo.inside(whole.ndim)] = last
        for index, slab in zip(slabs(self.halo), self.slabs, strict=True):
            whole[index] = slab
        return channels_first(whole)


def _copy(array: Array) -> Array:
    made = empty(array.shape, array)
    made[...] = array
    return made


def slabs(halo: Halo) -> Iterator[tuple[slice, ...]]:
    """Disjoint boxes of an array (N, *S, C) with ghosts, which cover all of the ghosts."""
    inside, padded = halo.plan.inside, halo.plan.padded
    every = slice(None)
    for dim, (part, n) in enumerate(zip(inside, padded, strict=True)):
        for low, high in ((0, part.start), (part.stop, n)):
            if low < high:
                rest = [slice(0, size) for size in padded[dim + 1 :]]
                yield (every, *inside[:dim], slice(low, high), *rest, every)
