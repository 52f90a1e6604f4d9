"""Halo exchange: each rank gets the cells around its block of an array that is cut in 1 to 3 dims.

A convolution near the border of a block reads cells of the neighbouring blocks, the ghosts (Dryden
et al. 2019, "Improving strong-scaling of CNN training by exploiting finer-grained parallelism").
Every rank gets all its ghosts, those at corners too, in one round: one message from
each rank that owns any of them. Exchanging dim after dim would need no messages across corners, but
each dim would have to wait for the one before, and so nothing could be computed beside the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.backend import is_half, kind, xp
from hpcml.comm.axis import Axis
from hpcml.comm.buffers import check_dtype
from hpcml.comm.halo_plan import Cut, Plan, Slices
from hpcml.comm.link import Link
from hpcml.comm.mesh import Mesh
from hpcml.comm.request import Request
from hpcml.comm.shards import new
from hpcml.comm.staging import as_array, on_device
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Array, Pending

Boxes = Mapping[int, list[Slices]]
"""Parts of an array by the rank that they go to or come from."""


class Halo:
    """The exchange of ghosts for arrays that are cut in the given dims, and its adjoint.

        halo = Halo(mesh, {-2: Cut("sp_h", 224, width=1), -1: Cut("sp_w", 224, width=1)})
        request = halo.start(x)        # x (..., h, w): this rank's block
        ...                            # compute what needs no ghosts, from x
        padded = request.wait()        # (..., 1 + h + 1, 1 + w + 1)

    dims: for each dim that is cut, how; dims count from the front or, if negative, from the back,
    so that the same object serves arrays with and without a batch. All other dims are whole, and of
    the same size on all ranks. The mesh axes of the dims must be distinct.

    Result: the block with its ghosts around. Each rank gets the full width on every side, wherever
    it stands. Where the global array ends (and the dim is not periodic) the ghosts are zeros, as a
    convolution with zero padding reads them: the convolution of the result without any padding is
    the rank's block of the padded convolution of the whole, and all ranks run the same code.

    Several exchanges may be under way if all ranks start them in the same order. Buffers are kept
    for the next one. Arrays are those that an `Axis` takes.

    Layout: S -> S with ghosts; adjoint: ghosts' gradients go back to their owners and are added.
    Ledger: operation "halo" on the product of the axes; bytes are ghosts received from other ranks.

    Raises `ValueError` for axes, blocks and widths that do not fit the mesh and, in use, for arrays
    that do not have this rank's block.
    """

    def __init__(self, mesh: Mesh, dims: Mapping[int, Cut]) -> None:
        """Plan the exchange; nothing is communicated."""
        self.dims = tuple(dims)
        sizes = [_sizes(mesh, cut) for cut in dims.values()]
        names = [name for part in sizes for name in part]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a halo needs dims that are cut along distinct axes, not {names}")
        self.axis: Axis = mesh[tuple(names)]
        lines = [
            cut.line(prod(part.values())) for cut, part in zip(dims.values(), sizes, strict=True)
        ]
        # Ranks of the product axis lie in the order of the mesh, whatever the order of the dims.
        order = _ordered(mesh, tuple(names))
        ranks = np.arange(self.axis.size).reshape([mesh.sizes.get(name, 1) for name in order])
        ranks = ranks.transpose([order.index(name) for name in names])
        ranks = ranks.reshape([len(line.blocks) for line in lines])
        self.plan = Plan(lines, ranks, self.axis.rank)
        self._link = Link(self.axis.transport)
        self._free: dict[tuple[int, np.dtype[Any], str], list[Array]] = {}

    def padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for a block of this shape."""
        return self._resized(shape, self.plan.block, self.plan.padded, "the block of this rank")

    def inside(self, ndim: int) -> tuple[slice, ...]:
        """Where the block lies in a result of `ndim` dims."""
        return self._index(self.plan.inside, ndim)

    def start(self, x: Any, out: Any = None) -> Request:
        """Start an exchange; `wait()` gives the block `x`, unchanged till then, with its ghosts."""
        x = _checked(x)
        out = _out(out, self.padded(x.shape), x)
        plan, ndim = self.plan, x.ndim
        request = _Exchange(self, x, plan.sends, out, plan.receives, accumulate=False)
        out[self.inside(ndim)] = x
        for gap in plan.gaps:
            out[self._index(gap, ndim)] = 0
        for source, target in plan.wraps:
            out[self._index(target, ndim)] = x[self._index(source, ndim)]
        return request

    def exchange(self, x: Any, out: Any = None) -> Any:
        """`start(x, out).wait()`: the block `x` with its ghosts."""
        return self.start(x, out).wait()

    def start_adjoint(self, g: Any, out: Any = None) -> Request:
        """Start the adjoint; `wait()` gives the gradient of the block.

        g: the gradient of the result of an exchange, unchanged until then. Gradients of ghosts are
        sent to the ranks that own the cells, and added there to the gradients of the block in a
        fixed order: this rank's own, then by rank. 16-bit floats are added in float32 and rounded
        once. Gradients of the zeros beyond the global array are dropped.
        """
        g = _checked(g)
        plan, ndim = self.plan, g.ndim
        shape = self._resized(g.shape, plan.padded, plan.block, "the block with its ghosts")
        out = _out(out, shape, g)
        total = new(shape, np.float32, g) if is_half(g.dtype) else out
        request = _Exchange(self, g, plan.receives, total, plan.sends, accumulate=True, rounded=out)
        total[...] = g[self.inside(ndim)]
        for source, target in plan.wraps:
            total[self._index(source, ndim)] += g[self._index(target, ndim)]
        return request

    def adjoint(self, g: Any, out: Any = None) -> Any:
        """`start_adjoint(g, out).wait()`: the gradient of the block."""
        return self.start_adjoint(g, out).wait()

    def _index(self, box: Slices, ndim: int) -> tuple[slice, ...]:
        index = [slice(None)] * ndim
        for dim, part in zip(self.dims, box, strict=True):
            index[dim] = part
        return tuple(index)

    def _resized(
        self, shape: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...], what: str
    ) -> tuple[int, ...]:
        """The shape with other sizes of the dims that are cut; checks the sizes it has."""
        sizes = dict(enumerate(shape)) | dict(enumerate(shape, -len(shape)))
        found = tuple(sizes.get(dim) for dim in self.dims)
        if found != old or len({dim % len(shape) for dim in self.dims}) < len(self.dims):
            wanted = ", ".join(f"{n} in dim {d}" for d, n in zip(self.dims, old, strict=True))
            raise ValueError(f"halo of shape {shape}: {what} has {wanted}")
        resized = list(shape)
        for dim, size in zip(self.dims, new, strict=True):
            resized[dim] = size
        return tuple(resized)

    def _borrow(self, count: int, like: Array) -> Array:
        free = self._free.setdefault((count, like.dtype, kind(like)), [])
        return free.pop() if free else memory.empty((count,), like.dtype, "buffers", kind(like))


class _Exchange(Request):
    """Messages under way: boxes of `source` leave, what comes is put or added into `target`."""

    def __init__(
        self,
        halo: Halo,
        source: Any,
        outgoing: Boxes,
        target: Any,
        incoming: Boxes,
        accumulate: bool,
        rounded: Any = None,
    ) -> None:
        self._halo, self._target, self._accumulate = halo, target, accumulate
        self._result = target if rounded is None else rounded
        self._over = False
        self._borrowed: list[Array] = []
        self._arriving: list[tuple[Pending, Array, list[Any]]] = []
        self._leaving: list[Pending] = []
        if halo.axis.size > 1:
            self._begin(source, outgoing, incoming)

    def _begin(self, source: Any, outgoing: Boxes, incoming: Boxes) -> None:
        halo, axis, link, ndim = self._halo, self._halo.axis, self._halo._link, source.ndim
        if on_device(source):
            link.settle()
        # Blocks differ between ranks; what agrees is the cells that lie side by side in other dims.
        cut = {dim % ndim for dim in halo.dims}
        across = prod(n for dim, n in enumerate(source.shape) if dim not in cut)
        axis._enter("halo", across, source.dtype)
        self._position = "halo", axis._group, axis._sequence, across, source.dtype.name
        received = 0
        try:
            if axis._sanitizer:
                payload = across * source.dtype.itemsize
                axis._sanitizer.agree("halo", axis._sequence, payload, source.dtype, "")
            # Receives before sends: no rank waits for another, whatever the network buffers.
            for peer, boxes in incoming.items():
                parts = [self._target[halo._index(box, ndim)] for box in boxes]
                flat = self._message(parts, source, pack=self._accumulate)
                self._arriving.append((link.irecv(flat, peer, Tag.HALO), flat, parts))
                received += flat.nbytes
            for peer, boxes in outgoing.items():
                parts = [source[halo._index(box, ndim)] for box in boxes]
                flat = self._message(parts, source)
                for part, place in _places(parts, flat):
                    place[...] = part
                self._leaving.append(link.isend(flat, peer, Tag.HALO))
        finally:
            axis.transport.board.leave()
        axis.ledger.record(axis.name, "halo", received, *link.take_counts())

    def wait(self) -> Any:
        """The result, once all messages have come and gone."""
        messages = self._messages()
        if messages:
            board = self._halo.axis.transport.board
            board.enter(*self._position)
            try:
                for message in messages:
                    message.wait()
            finally:
                board.leave()
        self._finish()
        return self._result

    def test(self) -> bool:
        """Whether all messages have come and gone."""
        done = [message.test() for message in self._messages()]
        if all(done):
            self._finish()
        return all(done)

    def _messages(self) -> list[Pending]:
        return [*(message for message, _, _ in self._arriving), *self._leaving]

    def _message(self, parts: list[Array], like: Array, pack: bool = False) -> Array:
        """The cells of a message where they lie, if they lie in order there, else a buffer."""
        if len(parts) == 1 and parts[0].flags.c_contiguous and not pack:
            return parts[0].reshape(-1)
        flat = self._halo._borrow(sum(part.size for part in parts), like)
        self._borrowed.append(flat)
        return flat

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        for _, flat, parts in self._arriving:
            for part, values in _places(parts, flat):
                if self._accumulate:
                    part += values
                else:
                    part[...] = values
        if self._result is not self._target:
            self._result[...] = self._target
        for flat in self._borrowed:
            self._halo._free[flat.size, flat.dtype, kind(flat)].append(flat)
        self._arriving, self._leaving, self._borrowed = [], [], []


def _places(parts: list[Any], flat: Array) -> Iterator[tuple[Any, Array]]:
    """Each part with its place in the message; none if the message is the part itself."""
    start = 0
    for part in parts:
        place = flat[start : start + part.size].reshape(part.shape)
        start += part.size
        if not xp(part).may_share_memory(part, place):
            yield part, place


def _sizes(mesh: Mesh, cut: Cut) -> dict[str, int]:
    """The mesh axes of a dim with their sizes, in the order of the mesh; what it lacks has 1."""
    names = (cut.axis,) if isinstance(cut.axis, str) else tuple(cut.axis)
    for name in names:
        mesh[name]  # raises for a name that is none
    return {name: mesh.sizes.get(name, 1) for name in _ordered(mesh, names)}


def _ordered(mesh: Mesh, names: tuple[str, ...]) -> tuple[str, ...]:
    known = mesh.grid.ordered(names)
    return (*known, *(name for name in names if name not in known))


def _checked(x: Any) -> Array:
    """The array itself, or that of an object with DLPack."""
    array = as_array(x, read=False)
    check_dtype(array.dtype)
    return array


def _out(out: Any, shape: tuple[int, ...], like: Any) -> Any:
    """Where a result of this shape goes, checked or new."""
    if out is None:
        return new(shape, like.dtype, like)
    if out.shape != shape or out.dtype != like.dtype:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype.name}, but the result has {shape} and "
            f"{like.dtype.name}"
        )
    return out
