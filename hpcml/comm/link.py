"""What a collective algorithm communicates through: messages between ranks, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcml.comm import direct, staging
from hpcml.comm.pieces import Several, pieces
from hpcml.comm.staging import on_device
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Array, Pending, Transport, Vendor

LIMIT = 1 << 30
"""Bytes of the longest message; longer buffers go in several. MPI before version 4 counts with 31
bits, and no network gains from longer ones. Tests lower it."""


class Link:
    """The ranks of a group as an algorithm sees them.

    Buffers are flat contiguous arrays of any type, of the same length on both ends; those of no
    elements are not sent at all. `sent` counts the bytes that this rank has sent since the last
    `take_counts`, `sent_off_node` those of them that went to ranks on other nodes.
    """

    def __init__(self, transport: Transport, table: Mapping[str, Any] | None = None) -> None:
        """Messages over `transport`; `table`: see `hpcml.comm.algorithms.choosing`."""
        self.transport = transport
        self.table: Mapping[str, Any] = table or {}
        """From which an algorithm chooses others for its parts."""
        self.size = transport.size
        self.rank = transport.rank
        self.members = transport.members
        """The number of each rank in the whole job."""
        self.vendor: Vendor | None = transport.vendor
        self.nodes = tuple(node.index for node in transport.nodes())
        self.node = self.nodes[self.rank]
        self.scratch: Callable[[], Any] = _none
        """Gives the memory that all ranks share, or None. The first use is collective."""
        self.sent = 0
        self.sent_off_node = 0
        self._parts: dict[tuple[int, ...], Link] = {}
        self._gpu = direct.asked()
        self._direct: bool | None = None

    @property
    def direct(self) -> bool:
        """Whether messages of a GPU's arrays are given to the carrier as they are.

        Else they go by way of the host. As far as this rank knows: see `settle`.
        """
        if self._direct is None:
            return direct.likely(self._gpu, self.transport.processes)
        return self._direct

    def settle(self) -> None:
        """Agree on `direct`, if that has not been done. Collective."""
        if self._direct is None and self.size > 1:
            self._direct = direct.settle(self, self._gpu)

    def isend(self, buffer: Array, dest: int, tag: int = Tag.COLLECTIVE) -> Pending:
        """Start to send to another rank; the buffer stays unchanged until `wait`."""
        self.count(buffer.nbytes, dest)
        if on_device(buffer):
            return staging.isend(self.transport, buffer, dest, tag, self.direct)
        parts = pieces(buffer, LIMIT)
        if len(parts) == 1:
            return self.transport.isend(parts[0], dest, tag)
        return Several([self.transport.isend(part, dest, tag) for part in parts])

    def irecv(self, buffer: Array, source: int, tag: int = Tag.COLLECTIVE) -> Pending:
        """Start to receive from another rank as many bytes as the buffer has."""
        if on_device(buffer):
            return staging.irecv(self.transport, buffer, source, tag, self.direct)
        parts = pieces(buffer, LIMIT)
        if len(parts) == 1:
            return self.transport.irecv(parts[0], source, tag)
        return Several([self.transport.irecv(part, source, tag) for part in parts])

    def send(self, buffer: Array, dest: int, tag: int = Tag.COLLECTIVE) -> None:
        """Send to another rank; the buffer may be used again on return."""
        self.isend(buffer, dest, tag).wait()

    def recv(self, buffer: Array, source: int, tag: int = Tag.COLLECTIVE) -> None:
        """Receive from another rank as many bytes as the buffer has."""
        self.irecv(buffer, source, tag).wait()

    def exchange(self, outgoing: Array, dest: int, incoming: Array, source: int) -> None:
        """Send to one rank while receiving from another (or the same) one."""
        self.start(outgoing, dest, incoming, source).wait()

    def start(self, outgoing: Array, dest: int, incoming: Array, source: int) -> Pending:
        """Start such an exchange."""
        return Several([self.irecv(incoming, source), self.isend(outgoing, dest)])

    def part(self, ranks: Sequence[int]) -> Link:
        """The link among some ranks of this one, in this order; called by exactly these.

        What is sent there counts here too.
        """
        chosen = tuple(ranks)
        if chosen not in self._parts:
            self._parts[chosen] = _Part(self, chosen)
        return self._parts[chosen]

    def count(self, nbytes: int, dest: int) -> None:
        """Count bytes that this rank hands to rank `dest`, by a message or otherwise."""
        self.sent += nbytes
        if self.nodes[dest] != self.node:
            self.sent_off_node += nbytes

    def count_local(self, nbytes: int) -> None:
        """Count bytes that this rank wrote into memory of others on its node, or let them fetch."""
        self.sent += nbytes

    def take_counts(self) -> tuple[int, int]:
        """Bytes sent, and of these off the node, since the last call."""
        counts = self.sent, self.sent_off_node
        self.sent = self.sent_off_node = 0
        return counts


class _Part(Link):
    """Some ranks of a link: the same messages, ranks counted anew. Needs no communicator."""

    def __init__(self, whole: Link, ranks: tuple[int, ...]) -> None:
        self.whole, self.ranks = whole, ranks
        self.size, self.rank = len(ranks), ranks.index(whole.rank)
        self.vendor = None
        self.table = whole.table
        self.members = tuple(whole.members[rank] for rank in ranks)
        self.nodes = tuple(whole.nodes[rank] for rank in ranks)
        self.node = whole.node
        self.scratch = _none
        self._parts = {}

    def isend(self, buffer: Array, dest: int, tag: int = Tag.COLLECTIVE) -> Pending:
        """Start to send to another member."""
        return self.whole.isend(buffer, self.ranks[dest], tag)

    def irecv(self, buffer: Array, source: int, tag: int = Tag.COLLECTIVE) -> Pending:
        """Start to receive from another member."""
        return self.whole.irecv(buffer, self.ranks[source], tag)

    def count(self, nbytes: int, dest: int) -> None:
        """Count bytes handed to a member."""
        self.whole.count(nbytes, self.ranks[dest])


def _none() -> None:
    return None
