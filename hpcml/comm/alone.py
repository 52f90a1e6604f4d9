"""The transport of a rank that is alone: an axis of size 1, or a world without MPI."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from hpcml.comm.board import Board
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array, Node, Pending, Transport, Vendor


def run(operation: str, x: Array | None, *rest: Any) -> None:
    """Any collective of a group of one: the arguments of an algorithm, without the link.

    The result is the input, or what `out` held with the input added.
    """
    if operation == "broadcast":
        return
    out = rest[0]
    reduction = next((given for given in rest if isinstance(given, Reduction)), None)
    if reduction is not None and reduction.onto:
        reduction.fold([x], out)  # type: ignore[list-item]  # the only rank is the root
    elif out is not x:
        out[...] = x


class Alone:
    """A `Transport` of one rank: nobody to send to, and every barrier passes."""

    size = 1
    rank = 0
    vendor: Vendor | None = None
    processes = False
    members: tuple[int, ...] = (0,)

    def __init__(self) -> None:
        self.board = Board()

    def isend(self, buffer: Array, dest: int, tag: int, synchronous: bool = False) -> Pending:
        """There is no other rank; `Axis` keeps messages to oneself."""
        raise AssertionError("a rank that is alone has nobody to send to")

    def irecv(self, buffer: Array, source: int, tag: int) -> Pending:
        """There is no other rank; `Axis` keeps messages to oneself."""
        raise AssertionError("a rank that is alone has nobody to receive from")

    def barrier(self) -> None:
        """Pass."""

    def barrier_within(self, seconds: float) -> bool:
        """Pass at once."""
        return True

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """Itself: there is no smaller group."""
        assert tuple(ranks) == (0,), ranks
        return self

    def background(self, name: str) -> Transport:
        """Itself: nobody waits here."""
        return self

    def nodes(self) -> tuple[Node, ...]:
        """This machine."""
        return (Node(platform.node(), 0, 0, 1),)

    def abort(self, code: int) -> None:
        """End the process at once."""
        os._exit(code)
