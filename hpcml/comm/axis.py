"""One axis of a mesh: a group of ranks and the blocking operations among them."""

from __future__ import annotations

import pickle
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from hpcml.comm import halves
from hpcml.comm.alone import Alone
from hpcml.comm.buffers import (
    Operands,
    blocks_of,
    check_dtype,
    check_out,
    contiguous,
    is_half,
    operands,
    stacked,
    unchanged,
    wire,
)
from hpcml.comm.ledger import Ledger, volume
from hpcml.comm.staging import stage
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Array, Transport

T = TypeVar("T")


class Axis:
    """The ranks along one axis (or a product of axes), and the operations among them.

    All ranks of the axis call the same operation in the same order, with arrays of equal shape and
    type. Arrays are NumPy, CuPy (staged through the host) or anything with `__dlpack__`, of
    float16, bfloat16, float32, float64 or an integer type; bool is moved but not reduced. 16-bit
    floats are added in float32, in the order of the ranks, and rounded once.

    `out` receives the result and is returned; it must be C-contiguous and of the result's shape and
    type. `out is x` works in place where the shapes agree. Without `out` the result is a new array,
    on an axis of size 1 too, where every operation is a copy and nothing is counted in the ledger.

    Raises `ValueError` for types that cannot be communicated, shapes that do not fit and an unfit
    `out`, before anything is sent; `TypeError` for what is no array.
    """

    def __init__(
        self, name: str, transport: Transport | None = None, ledger: Ledger | None = None
    ) -> None:
        """An axis over a transport; without one, an axis of size 1."""
        self.name = name
        self.transport: Transport = Alone() if transport is None else transport
        self.ledger = Ledger() if ledger is None else ledger
        self.size = self.transport.size
        self.rank = self.transport.rank
        self._to_self: dict[int, deque[Array]] = defaultdict(deque)

    def __repr__(self) -> str:
        return f"Axis({self.name!r}, size={self.size}, rank={self.rank})"

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """Memory, not initialised, that the axis can reduce in place."""
        return np.empty(shape, dtype)

    def allreduce(self, x: Any, op: str = "sum", out: Any = None) -> Any:
        """Combine `x` element-wise over the ranks: sum, prod, min or max. All get the result."""
        arrays = operands(x, out, unchanged, op)
        self._count("all_reduce", arrays.source.nbytes)
        source, target = arrays.source, _present(arrays)
        if is_half(source.dtype):
            halves.allreduce(self.transport, source, target, op)
        else:
            self.transport.allreduce(source, target, op)
        return arrays.finish()

    def reduce(self, x: Any, op: str = "sum", root: int = 0, out: Any = None) -> Any:
        """As `allreduce`, but only rank `root` gets the result; the others get None."""
        self._check_rank("root", root)
        arrays = operands(x, out, unchanged, op, receives=self.rank == root)
        # The chain of partial sums ends at the root.
        self._count("reduce", arrays.source.nbytes, forwards=self.rank != root)
        source, target = arrays.source, arrays.target
        if is_half(source.dtype):
            halves.reduce(self.transport, source, target, op, root)
        else:
            self.transport.reduce(source, target, op, root)
        return arrays.finish()

    def reduce_scatter(self, x: Any, op: str = "sum", out: Any = None) -> Any:
        """Combine `x` of shape (size * k, ...); rank r gets rows r*k to (r+1)*k of the result.

        Raises `ValueError` if the axis size does not divide dim 0.
        """
        arrays = operands(x, out, blocks_of("reduce_scatter", self.size), op)
        self._count("reduce_scatter", arrays.source.nbytes)
        source, target = arrays.source, _present(arrays)
        if is_half(source.dtype):
            halves.reduce_scatter(self.transport, source, target, op)
        else:
            self.transport.reduce_scatter(source, target, op)
        return arrays.finish()

    def allgather(self, x: Any, out: Any = None) -> Any:
        """Join the equal-shaped `x` (k, ...) of all ranks along dim 0 to (size * k, ...).

        `x` may be this rank's own block of `out`: then nothing is copied.
        """
        arrays = operands(x, out, stacked("allgather", self.size), home=self.rank)
        target = _present(arrays)
        self._count("all_gather", target.nbytes)
        self.transport.allgather(wire(arrays.source), wire(target))
        return arrays.finish()

    def gather(self, x: Any, root: int = 0, out: Any = None) -> Any:
        """As `allgather`, but only rank `root` gets the result; the others get None."""
        self._check_rank("root", root)
        receives = self.rank == root
        arrays = operands(x, out, stacked("gather", self.size), receives=receives, home=self.rank)
        self._count("gather", arrays.source.nbytes * self.size, forwards=self.rank != root)
        source, target = arrays.source, arrays.target
        self.transport.gather(wire(source), None if target is None else wire(target), root)
        return arrays.finish()

    def scatter(self, x: Any, root: int = 0, out: Any = None) -> Any:
        """Rank r gets rows r*k to (r+1)*k of the root's `x` of shape (size * k, ...).

        Every rank passes an array of that shape and type, whose values count on the root alone.
        Raises `ValueError` if the axis size does not divide dim 0.
        """
        self._check_rank("root", root)
        arrays = operands(x, out, blocks_of("scatter", self.size))
        self._count("scatter", arrays.source.nbytes, forwards=self.rank == root)
        source = wire(arrays.source) if self.rank == root else None
        self.transport.scatter(source, wire(_present(arrays)), root)
        return arrays.finish()

    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any:
        """All ranks get the root's `x`; `out is x` overwrites it in place.

        Every rank passes an array of the same shape and type, whose values count on the root alone.
        """
        self._check_rank("root", root)
        arrays = operands(x, out, unchanged)
        # The chain begins at the root and ends at the rank before it.
        last = (root - 1) % self.size
        self._count("broadcast", arrays.source.nbytes, forwards=self.rank != last)
        target = _present(arrays)
        if self.rank == root and target is not arrays.source:
            np.copyto(target, arrays.source)
        self.transport.broadcast(wire(target), root)
        return arrays.finish()

    def alltoall(self, x: Any, out: Any = None) -> Any:
        """Cut dim 0 into `size` equal blocks; block s of rank r becomes block r of rank s.

        Raises `ValueError` if the axis size does not divide dim 0.
        """
        cut = blocks_of("alltoall", self.size)

        def same_if_cut(shape: tuple[int, ...]) -> tuple[int, ...]:
            cut(shape)
            return shape

        arrays = operands(x, out, same_if_cut)
        self._count("all_to_all", arrays.source.nbytes)
        target = wire(_present(arrays))
        in_place = arrays.source is arrays.target
        self.transport.alltoall(target if in_place else wire(arrays.source), target)
        return arrays.finish()

    def send(self, x: Any, dest: int, tag: int = Tag.MESSAGE) -> None:
        """Send `x` to rank `dest`, which calls `recv`. May wait until it does.

        A message to oneself is kept until the `recv` that follows.
        """
        self._check_rank("dest", dest)
        source = contiguous(stage(x).host)
        check_dtype(source.dtype)
        if dest == self.rank:
            self._to_self[tag].append(source.copy())
            return
        self._count("send", source.nbytes)
        self.transport.send(wire(source), dest, tag)

    def recv(self, out: Any, source: int, tag: int = Tag.MESSAGE) -> Any:
        """Receive into `out` the array of the same shape and type that rank `source` sends."""
        self._check_rank("source", source)
        place = stage(out, read=False)
        check_dtype(place.host.dtype)
        check_out(place.host, place.host.shape, place.host.dtype)
        if source != self.rank:
            self.transport.recv(wire(place.host), source, tag)
        elif self._to_self[tag]:
            message = self._to_self[tag].popleft()
            check_out(place.host, message.shape, message.dtype)
            np.copyto(place.host, message)
        else:
            raise ValueError(
                f"rank {self.rank} receives from itself (tag {tag}) what it never sent"
            )
        place.commit()
        return out

    def barrier(self) -> None:
        """Return when all ranks of the axis have come here."""
        self._count("barrier", 0)
        self.transport.barrier()

    def allgather_object(self, value: T) -> list[T]:
        """The small Python values of all ranks, pickled, in the order of the ranks."""
        text = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self.transport.allgather(np.array([text.size], np.int64), lengths)
        longest = int(lengths.max())
        padded = np.zeros(longest, np.uint8)
        padded[: text.size] = text
        texts = np.empty(self.size * longest, np.uint8)
        self._count("all_gather_object", texts.nbytes)
        self.transport.allgather(padded, texts)
        rows = texts.reshape(self.size, longest)
        return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """The root's small Python value, pickled."""
        self._check_rank("root", root)
        text = np.frombuffer(pickle.dumps(value if self.rank == root else None), np.uint8).copy()
        length = np.array([text.size], np.int64)
        self.transport.broadcast(length, root)
        if self.rank != root:
            text = np.empty(int(length[0]), np.uint8)
        self._count("broadcast_object", text.nbytes, self.rank != (root - 1) % self.size)
        self.transport.broadcast(text, root)
        received: T = pickle.loads(text.tobytes())
        return received

    def _count(self, operation: str, payload: int, forwards: bool = True) -> None:
        if self.size > 1:
            sent = volume(operation, payload, self.size, forwards)
            self.ledger.record(self.name, operation, payload, sent)

    def _check_rank(self, what: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}={rank} is outside the axis {self.name}({self.size})")


def _present(arrays: Operands) -> Array:
    assert arrays.target is not None, "every rank gets a result here"
    return arrays.target
