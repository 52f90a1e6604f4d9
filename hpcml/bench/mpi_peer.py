"""The MPI library's collectives as programs call them by mpi4py: the peer to compare with."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from hpcml.bench.rounds import Call

Array = np.ndarray[Any, np.dtype[Any]]


class MpiPeer:
    """Calls on a communicator of their own among all ranks of the job, with rank 0 as the root."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()

    @property
    def library(self) -> str:
        """Name and version of the MPI library."""
        first = self._mpi.Get_library_version().strip("\0\n ").splitlines()[0]
        return " ".join(first.split())

    def call(self, operation: str, x: Array, out: Array) -> Call:
        """The call that does what `axis.<operation>(x, out=out)` does."""
        comm, total = self._comm, self._mpi.SUM
        here: Any = self._mpi.IN_PLACE
        root = comm.rank == 0
        match operation:
            case "allreduce":
                return partial(comm.Allreduce, here, out, total)
            case "reduce":
                return partial(comm.Reduce, here if root else x, out if root else None, total, 0)
            case "broadcast":
                return partial(comm.Bcast, out, 0)
            case "reduce_scatter":
                return partial(comm.Reduce_scatter_block, x, out, total)
            case "allgather":
                return partial(comm.Allgather, here, out)
            case "gather":
                return partial(comm.Gather, x, out if root else None, 0)
            case "scatter":
                return partial(comm.Scatter, x if root else None, out, 0)
            case _:
                assert operation == "alltoall", operation
                return partial(comm.Alltoall, x, out)
