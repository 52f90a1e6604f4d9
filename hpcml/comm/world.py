"""The world of this process and its transport over MPI: the one place that imports mpi4py."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Sequence
from typing import Any

from hpcml.comm import crash
from hpcml.comm.alone import Alone
from hpcml.comm.launch import check_world, read
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Array, Node, Transport
from hpcml.errors import UserError


@functools.cache
def world() -> Transport:
    """All ranks of the job, on a communicator of the package's own.

    The first call initialises MPI (threads may communicate) and is collective. Without mpi4py or an
    MPI library a process that was started alone gets a world of one. With several ranks, an
    uncaught exception on any of them ends the job from now on (see `hpcml.comm.crash`).

    Raises `UserError` if there is no MPI to a launcher's several processes, or if the launcher
    started several copies of a world of one rank.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library to load
        job = read()
        if job.size > 1:
            raise UserError(
                f"{job.variable}={job.size}, but mpi4py cannot be used ({_first_line(error)}): "
                "install it with an MPI library: pip install 'hpcml[mpich]'"
            ) from error
        return Alone()
    check_world(MPI.COMM_WORLD.Get_size())
    if MPI.COMM_WORLD.Get_size() == 1:
        return Alone()
    transport = MpiTransport(MPI.COMM_WORLD.Dup())
    crash.install(transport)
    return transport


def wrap(comm: Any) -> Transport:
    """A communicator of the caller's as a transport; a transport is taken as it is. Collective."""
    if hasattr(comm, "barrier_within"):
        transport: Transport = comm
        return transport
    if not hasattr(comm, "Create_group"):
        raise TypeError(f"comm is to be an mpi4py communicator, not {comm!r:.60}")
    return MpiTransport(comm.Dup()) if comm.Get_size() > 1 else Alone()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class MpiTransport:
    """A `Transport` over an mpi4py intracommunicator, which it owns."""

    def __init__(self, comm: Any) -> None:
        """A transport over this communicator; 16-bit floats and bool never get here."""
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._ops = {"sum": MPI.SUM, "prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX}
        self._subsets: dict[tuple[tuple[int, ...], str], Transport] = {}
        self._nodes: tuple[Node, ...] | None = None
        self.size: int = comm.Get_size()
        self.rank: int = comm.Get_rank()

    def allreduce(self, buffer: Array, out: Array, op: str) -> None:
        """`MPI_Allreduce`."""
        self._comm.Allreduce(self._unless_in(buffer, out), out, self._ops[op])

    def reduce(self, buffer: Array, out: Array | None, op: str, root: int) -> None:
        """`MPI_Reduce`."""
        self._comm.Reduce(self._unless_in(buffer, out), out, self._ops[op], root)

    def reduce_scatter(self, buffer: Array, out: Array, op: str) -> None:
        """`MPI_Reduce_scatter_block`."""
        self._comm.Reduce_scatter_block(buffer, out, self._ops[op])

    def allgather(self, buffer: Array, out: Array) -> None:
        """`MPI_Allgather`."""
        self._comm.Allgather(self._unless_in(buffer, out), out)

    def gather(self, buffer: Array, out: Array | None, root: int) -> None:
        """`MPI_Gather`."""
        self._comm.Gather(self._unless_in(buffer, out), out, root)

    def scatter(self, buffer: Array | None, out: Array, root: int) -> None:
        """`MPI_Scatter`."""
        self._comm.Scatter(buffer, out, root)

    def broadcast(self, buffer: Array, root: int) -> None:
        """`MPI_Bcast`."""
        self._comm.Bcast(buffer, root)

    def alltoall(self, buffer: Array, out: Array) -> None:
        """`MPI_Alltoall`."""
        self._comm.Alltoall(self._unless_in(buffer, out), out)

    def send(self, buffer: Array, dest: int, tag: int) -> None:
        """`MPI_Send`."""
        self._comm.Send(buffer, dest, tag)

    def recv(self, buffer: Array, source: int, tag: int) -> None:
        """`MPI_Recv`; raises `ValueError` if the message has another length than the buffer."""
        status = self._mpi.Status()
        self._comm.Recv(buffer, source, tag, status)
        if status.Get_count(self._mpi.BYTE) != buffer.nbytes:
            raise ValueError(
                f"a message of {status.Get_count(self._mpi.BYTE)} bytes came from rank {source} "
                f"(tag {tag}) for an array of {buffer.nbytes} bytes: shapes and types must agree"
            )

    def barrier(self) -> None:
        """`MPI_Barrier`."""
        self._comm.Barrier()

    def barrier_within(self, seconds: float) -> bool:
        """`MPI_Ibarrier`, polled."""
        request = self._comm.Ibarrier()
        end = time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """`MPI_Comm_create_group`, which concerns the members alone; kept, for they are few.

        An MPI library has room for some thousand communicators, and programs make many meshes.
        """
        members = tuple(ranks)
        if len(members) == 1:
            return Alone()
        if (members, name) not in self._subsets:
            group = self._comm.Get_group()
            part = group.Incl(members)
            comm = self._comm.Create_group(part, tag=Tag.GROUP)
            part.Free()
            group.Free()
            self._subsets[members, name] = MpiTransport(comm)
        return self._subsets[members, name]

    def nodes(self) -> tuple[Node, ...]:
        """The nodes by `MPI_Comm_split_type(SHARED)`, in the order of their first ranks."""
        if self._nodes is None:
            local = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
            first = local.bcast(self.rank)
            mine = (first, platform.node(), local.Get_rank(), local.Get_size())
            local.Free()
            places = self._comm.allgather(mine)
            order = sorted({place[0] for place in places})
            self._nodes = tuple(
                Node(host, order.index(first), local_rank, local_size)
                for first, host, local_rank, local_size in places
            )
        return self._nodes

    def abort(self, code: int) -> None:
        """`MPI_Abort` of the whole job."""
        self._mpi.COMM_WORLD.Abort(code)

    def _unless_in(self, buffer: Array, out: Array | None) -> Any:
        """MPI's name for "where the result goes" if the input lies there, else the input."""
        if out is None or not _share(buffer, out):
            return buffer
        return self._mpi.IN_PLACE


def _share(buffer: Array, out: Array) -> bool:
    """Whether the input lies in the result: nothing but these two cases may overlap."""
    if buffer is out:
        return True
    start, at = (x.__array_interface__["data"][0] for x in (out, buffer))
    return bool(buffer.nbytes and start <= at < start + out.nbytes)
