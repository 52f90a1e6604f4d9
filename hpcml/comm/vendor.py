"""The collectives of the MPI library, on flat NumPy arrays of types it knows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml.comm.transport import Array


class MpiVendor:
    """A `Vendor` over an mpi4py intracommunicator."""

    def __init__(self, comm: Any) -> None:
        """The collectives of this communicator."""
        from mpi4py import MPI

        self._comm = comm
        # Before version 4 of the standard, counts were C's int.
        self.limit = sys.maxsize if MPI.Get_version()[0] >= 4 else 2**31 - 1
        self._in_place = MPI.IN_PLACE
        self._ops = {"sum": MPI.SUM, "prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX}

    def allreduce(self, buffer: Array, out: Array, op: str) -> None:
        """`MPI_Allreduce`."""
        self._comm.Allreduce(self._unless_in(buffer, out), out, self._ops[op])

    def reduce(self, buffer: Array, out: Array | None, op: str, root: int) -> None:
        """`MPI_Reduce`."""
        self._comm.Reduce(self._unless_in(buffer, out), out, self._ops[op], root)

    def reduce_scatter(self, buffer: Array, out: Array, counts: Sequence[int], op: str) -> None:
        """`MPI_Reduce_scatter_block`, or `MPI_Reduce_scatter` if the counts differ."""
        if _share(out, buffer):
            buffer = buffer.copy()  # MPI has no name for "my block goes where it came from"
        if not out.size:
            out = np.empty_like(out)  # an empty block that begins within the input counts as alias
        if len(set(counts)) == 1:
            self._comm.Reduce_scatter_block(buffer, out, self._ops[op])
        else:
            self._comm.Reduce_scatter(buffer, out, list(counts), self._ops[op])

    def allgather(self, buffer: Array, out: Array, counts: Sequence[int]) -> None:
        """`MPI_Allgather`, or `MPI_Allgatherv` if the counts differ."""
        source = self._unless_in(buffer, out)
        if len(set(counts)) == 1:
            self._comm.Allgather(source, out)
        else:
            self._comm.Allgatherv(source, [out, list(counts)])

    def gather(self, buffer: Array, out: Array | None, counts: Sequence[int], root: int) -> None:
        """`MPI_Gather`, or `MPI_Gatherv` if the counts differ."""
        source = self._unless_in(buffer, out)
        if len(set(counts)) == 1:
            self._comm.Gather(source, out, root)
        else:
            self._comm.Gatherv(source, None if out is None else [out, list(counts)], root)

    def scatter(self, buffer: Array | None, out: Array, counts: Sequence[int], root: int) -> None:
        """`MPI_Scatter`, or `MPI_Scatterv` if the counts differ."""
        if len(set(counts)) == 1:
            self._comm.Scatter(buffer, out, root)
        else:
            self._comm.Scatterv(None if buffer is None else [buffer, list(counts)], out, root)

    def broadcast(self, buffer: Array, root: int) -> None:
        """`MPI_Bcast`."""
        self._comm.Bcast(buffer, root)

    def alltoall(
        self, buffer: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
    ) -> None:
        """`MPI_Alltoallv`: ranks cannot know whether the counts of all others are even."""
        if _share(buffer, out):
            buffer = buffer.copy()
        self._comm.Alltoallv([buffer, list(sends)], [out, list(receives)])

    def _unless_in(self, buffer: Array, out: Array | None) -> Any:
        """MPI's name for "where the result goes" if the input lies there, else the input."""
        return buffer if out is None or not _share(buffer, out) else self._in_place


def _share(buffer: Array, out: Array) -> bool:
    """Whether the input lies in the result: nothing but these two cases may overlap."""
    return buffer is out or np.may_share_memory(buffer, out)
