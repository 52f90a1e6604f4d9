"""What an axis needs from whatever carries its data: MPI now, threads of one process later.

A transport moves contiguous NumPy buffers of types that the carrier knows (integers, float32,
float64); shapes, 16-bit floats, devices and the ledger are the business of `Axis`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

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


class Transport(Protocol):
    """Blocking operations among `size` ranks on contiguous buffers of equal length on all ranks.

    `op` is one of sum, prod, min, max. `buffer is out` asks for the operation in place; otherwise
    the two do not overlap, save that `allgather` and `gather` also take a rank's own block of `out`
    as its `buffer`.
    """

    size: int
    rank: int

    def allreduce(self, buffer: Array, out: Array, op: str) -> None:
        """Combine element-wise over the ranks; all get the result."""

    def reduce(self, buffer: Array, out: Array | None, op: str, root: int) -> None:
        """The same for the root alone; `out` is None elsewhere."""

    def reduce_scatter(self, buffer: Array, out: Array, op: str) -> None:
        """Combine, and rank r gets the r-th of `size` equal blocks."""

    def allgather(self, buffer: Array, out: Array) -> None:
        """All ranks get the buffers of all, in the order of the ranks."""

    def gather(self, buffer: Array, out: Array | None, root: int) -> None:
        """The same for the root alone; `out` is None elsewhere."""

    def scatter(self, buffer: Array | None, out: Array, root: int) -> None:
        """Rank r gets the r-th equal block of the root's buffer, which is None elsewhere."""

    def broadcast(self, buffer: Array, root: int) -> None:
        """All ranks get the root's buffer, in place."""

    def alltoall(self, buffer: Array, out: Array) -> None:
        """Block s of rank r becomes block r of rank s."""

    def send(self, buffer: Array, dest: int, tag: int) -> None:
        """Send to another rank; returns when the buffer may be used again."""

    def recv(self, buffer: Array, source: int, tag: int) -> None:
        """Receive from another rank a message of the buffer's length."""

    def barrier(self) -> None:
        """Return when all ranks have come here."""

    def barrier_within(self, seconds: float) -> bool:
        """Wait for all ranks to come here, but not longer; tell whether they came."""

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """A transport among these ranks, in this order. Called by exactly these ranks.

        Asking again for the same ranks and name gives the same transport.
        """

    def nodes(self) -> tuple[Node, ...]:
        """Where each rank runs. The first call is collective."""

    def abort(self, code: int) -> None:
        """End the whole job now, other ranks included."""


def copy(buffer: Array, out: Array | None) -> None:
    """Copy between the buffers of a rank that is alone, unless they are the same."""
    if out is not None and out is not buffer:
        np.copyto(out, buffer)
