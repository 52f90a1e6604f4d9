"""What an axis needs from whatever carries its data: MPI between processes, queues between threads.

A transport moves contiguous buffers as bytes between ranks and knows where they run. Collectives
are made of such messages (`hpcml.comm.algorithms`); where the carrier brings collectives of its
own, `vendor` offers them as one more algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpcml.comm.board import Board

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Node:
    """Where a rank runs: ranks that can share memory are on one node."""

    host: str
    """Name of the machine."""
    index: int
    """Number of the node, in the order of its first rank."""
    local_rank: int
    """Position of the rank among those of its node."""
    local_size: int
    """Ranks on the node."""


class Pending(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Return when the buffer may be used: read again after a send, read after a receive.

        Raises `ValueError` if a message of another length came.
        """

    def test(self) -> bool:
        """Whether `wait` would return at once. Completes the message if so, like `wait`."""


class Vendor(Protocol):
    """Blocking collectives of the carrier on flat arrays of types it knows.

    Those are integers, float32 and float64. `op` is one of sum, prod, min, max. `buffer is out`
    asks for the operation in place; otherwise the two do not overlap, save that a rank's block of
    an all-gather or gather may already lie at its place in `out`. `counts` are elements by rank.
    """

    limit: int
    """The most elements of a buffer that a call takes."""

    def allreduce(self, buffer: Array, out: Array, op: str) -> None:
        """Combine element-wise over the ranks; all get the result."""

    def reduce(self, buffer: Array, out: Array | None, op: str, root: int) -> None:
        """The same for the root alone; `out` is None elsewhere."""

    def reduce_scatter(self, buffer: Array, out: Array, counts: Sequence[int], op: str) -> None:
        """Combine, and rank r gets the r-th block, of `counts[r]` elements."""

    def allgather(self, buffer: Array, out: Array, counts: Sequence[int]) -> None:
        """All ranks get the blocks of all, in the order of the ranks."""

    def gather(self, buffer: Array, out: Array | None, counts: Sequence[int], root: int) -> None:
        """The same for the root alone; `out` is None elsewhere."""

    def scatter(self, buffer: Array | None, out: Array, counts: Sequence[int], root: int) -> None:
        """Rank r gets the r-th block of the root's buffer, which is None elsewhere."""

    def broadcast(self, buffer: Array, root: int) -> None:
        """All ranks get the root's buffer, in place."""

    def alltoall(
        self, buffer: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
    ) -> None:
        """Block s of rank r becomes block r of rank s."""


class Transport(Protocol):
    """Messages among `size` ranks, in order between any two of them for one tag."""

    size: int
    rank: int
    vendor: Vendor | None
    """The carrier's own collectives, if it has any."""
    processes: bool
    """Whether the ranks are processes, which share no memory unless they map it."""
    members: tuple[int, ...]
    """The number of each rank in the whole job, which is how reports name it."""
    board: Board
    """Where the ranks of the job note what they are doing."""

    def isend(self, buffer: Array, dest: int, tag: int, synchronous: bool = False) -> Pending:
        """Start to send a contiguous buffer to another rank.

        `synchronous`: done only when the other rank has begun to receive, as the tests want it.
        """

    def irecv(self, buffer: Array, source: int, tag: int) -> Pending:
        """Start to receive from another rank a message of the buffer's length."""

    def barrier(self) -> None:
        """Return when all ranks have come here."""

    def barrier_within(self, seconds: float) -> bool:
        """Wait for all ranks to come here, but not longer; tell whether they came."""

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """A transport among these ranks, in this order. Called by exactly these ranks.

        Asking again for the same ranks and name gives the same transport; another name gives one
        whose messages cannot be mistaken for this one's, as a communication thread needs it.
        """

    def background(self, name: str) -> Transport:
        """A transport among the same ranks for a communication thread, the same for each name.

        Its waits leave the CPU to those who compute, and it has no vendor's collectives, which
        would not. Collective.
        """

    def nodes(self) -> tuple[Node, ...]:
        """Where each rank runs. The first call is collective."""

    def abort(self, code: int) -> None:
        """End the whole job now, other ranks included."""


def wrong_length(found: int | None, expected: int, source: int, tag: int) -> ValueError:
    """The error for a message that has not the length of its array; `found` None: a longer one."""
    size = f"more than {expected}" if found is None else f"{found}"
    return ValueError(
        f"a message of {size} bytes came from rank {source} (tag {tag}) for an array of "
        f"{expected} bytes: shapes and types must agree"
    )
