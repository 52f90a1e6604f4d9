"""The transport of a rank that is alone: an axis of size 1, or a world without MPI."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from hpcml.comm.transport import Array, Node, copy


class Alone:
    """A `Transport` of one rank: every collective is a copy, every barrier passes."""

    size = 1
    rank = 0

    def allreduce(self, buffer: Array, out: Array, op: str) -> None:
        """Copy."""
        copy(buffer, out)

    def reduce(self, buffer: Array, out: Array | None, op: str, root: int) -> None:
        """Copy."""
        copy(buffer, out)

    def reduce_scatter(self, buffer: Array, out: Array, op: str) -> None:
        """Copy."""
        copy(buffer, out)

    def allgather(self, buffer: Array, out: Array) -> None:
        """Copy."""
        copy(buffer, out)

    def gather(self, buffer: Array, out: Array | None, root: int) -> None:
        """Copy."""
        copy(buffer, out)

    def scatter(self, buffer: Array | None, out: Array, root: int) -> None:
        """Copy."""
        assert buffer is not None, "the only rank is the root"
        copy(buffer, out)

    def broadcast(self, buffer: Array, root: int) -> None:
        """Nothing to do: the buffer is the root's."""

    def alltoall(self, buffer: Array, out: Array) -> None:
        """Copy."""
        copy(buffer, out)

    def send(self, buffer: Array, dest: int, tag: int) -> None:
        """There is no other rank; `Axis` keeps messages to oneself."""
        raise AssertionError("a rank that is alone has nobody to send to")

    def recv(self, buffer: Array, source: int, tag: int) -> None:
        """There is no other rank; `Axis` keeps messages to oneself."""
        raise AssertionError("a rank that is alone has nobody to receive from")

    def barrier(self) -> None:
        """Pass."""

    def barrier_within(self, seconds: float) -> bool:
        """Pass at once."""
        return True

    def subset(self, ranks: Sequence[int], name: str) -> Alone:
        """Itself: there is no smaller group."""
        assert tuple(ranks) == (0,), ranks
        return self

    def nodes(self) -> tuple[Node, ...]:
        """This machine."""
        return (Node(platform.node(), 0, 0, 1),)

    def abort(self, code: int) -> None:
        """End the process at once."""
        os._exit(code)
