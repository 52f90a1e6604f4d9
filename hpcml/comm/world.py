"""The world of this process and its transport over MPI: the one place that imports mpi4py."""

from __future__ import annotations

import functools
import os
import platform
import signal
import time
from collections.abc import Sequence
from typing import Any

from hpcml import backend
from hpcml.comm import crash, sentinel, watch
from hpcml.comm.alone import Alone
from hpcml.comm.ambient import here
from hpcml.comm.board import Board, Group
from hpcml.comm.launch import apart, check_world, read
from hpcml.comm.messages import Received, Sent
from hpcml.comm.noted import open_board
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Array, Node, Pending, Transport, Vendor
from hpcml.comm.vendor import MpiVendor
from hpcml.errors import UserError

_PATIENCE = 10
"""Seconds that `MPI_Abort` has to end this process."""


def neighbours(mpi: Any, comm: Any) -> Any:
    """The ranks of `comm` on this rank's node, by `MPI_Comm_split_type(SHARED)`. Collective.

    An MPICH that shall take all messages to UCX (`APART`) says that each rank is a node of its own:
    then ranks of a host are on one node. `mpi`: the module mpi4py.MPI.
    """
    if not apart():
        return comm.Split_type(mpi.COMM_TYPE_SHARED)
    hosts = comm.allgather(platform.node())
    return comm.Split(hosts.index(platform.node()), comm.rank)


def world() -> Transport:
    """All ranks of the job: those of `hpcml.run` in a thread of it, else those of MPI.

    The first call initialises MPI (threads may communicate) and is collective. Without mpi4py or an
    MPI library a process that was started alone gets a world of one. With several ranks, an
    uncaught exception on any of them ends the job from now on (see `hpcml.comm.crash`), and so does
    a wait that is too long (`hpcml.comm.watch`); if one is killed, the positions of the ranks of
    its node are told (`hpcml.comm.sentinel`).

    Raises `UserError` for a bad `HPCML_TIMEOUT`, if there is no MPI to a launcher's several
    processes, or if the launcher started several copies of a world of one rank.
    """
    return here.rank.world if here.rank is not None else _mpi_world()


@functools.cache
def _mpi_world() -> Transport:
    """All processes of the job, on a communicator of the package's own."""
    seconds = watch.limit()
    # A process that dies closes its files by their numbers, some of MPI's slowly: this one before.
    pipe = os.pipe() if read().size > 1 else None
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
    backend.keep_freed_memory()  # algorithms ask for scratch memory again and again
    transport = MpiTransport(MPI.COMM_WORLD.Dup())
    transport.board = board = open_board(transport, pipe)
    crash.install(transport, board)
    watch.start(board, seconds, transport.abort)
    transport.barrier()  # all ranks are on the board
    if board.index == 0:
        sentinel.start(board.sheet)
    return transport


def wrap(comm: Any) -> Transport:
    """A communicator of the caller's as a transport; a transport is taken as it is. Collective."""
    if hasattr(comm, "barrier_within"):
        transport: Transport = comm
        return transport
    if not hasattr(comm, "Create_group"):
        raise TypeError(f"comm is to be an mpi4py communicator, not {comm!r:.60}")
    if comm.Get_size() == 1:
        return Alone()
    from mpi4py import MPI

    if comm.Get_size() == MPI.COMM_WORLD.Get_size():
        world()  # all processes are here, so that they can make it together
    members = _numbers(comm)
    board = _mpi_world().board if _mpi_world.cache_info().currsize else Board()
    return MpiTransport(comm.Dup(), members, board)


def _numbers(comm: Any) -> list[int]:
    """The number of each rank of a communicator in the whole job."""
    from mpi4py import MPI

    whole, part = MPI.COMM_WORLD.Get_group(), comm.Get_group()
    members: list[int] = part.Translate_ranks(None, whole)
    part.Free()
    whole.Free()
    return members


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class MpiTransport:
    """A `Transport` over an mpi4py intracommunicator, which it owns."""

    processes = True

    def __init__(
        self, comm: Any, members: Sequence[int] | None = None, board: Board | None = None
    ) -> None:
        """Messages over this communicator, of the job's ranks `members` (all, if not given)."""
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._subsets: dict[tuple[tuple[int, ...], str], Transport] = {}
        self._nodes: tuple[Node, ...] | None = None
        self.size: int = comm.Get_size()
        self.rank: int = comm.Get_rank()
        self.members = tuple(range(self.size) if members is None else members)
        self.vendor: Vendor | None = MpiVendor(comm)
        self.patient = False
        self.board = Board() if board is None else board

    def isend(self, buffer: Array, dest: int, tag: int, synchronous: bool = False) -> Pending:
        """`MPI_Isend` or `MPI_Issend`."""
        start = self._comm.Issend if synchronous else self._comm.Isend
        return Sent(start(buffer, dest, tag), self.patient)

    def irecv(self, buffer: Array, source: int, tag: int) -> Pending:
        """`MPI_Irecv`."""
        request = self._comm.Irecv(buffer, source, tag)
        return Received(request, self.patient, buffer.nbytes, source, tag)

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

    def background(self, name: str) -> Transport:
        """`MPI_Comm_create_group`, with waits that sleep between looks."""
        twin = self.subset(range(self.size), f"{name} in the background")
        assert isinstance(twin, MpiTransport)
        twin.patient, twin.vendor = True, None
        return twin

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """`MPI_Comm_create_group`, which concerns the members alone; kept, for they are few.

        An MPI library has room for some thousand communicators, and programs make many meshes.
        """
        chosen = tuple(ranks)
        if len(chosen) == 1:
            return Alone()
        if (chosen, name) not in self._subsets:
            members = tuple(self.members[rank] for rank in chosen)
            group = self._comm.Get_group()
            part = group.Incl(chosen)
            self.board.enter("making of the axis", Group(name, members), 1, 0, "")
            comm = self._comm.Create_group(part, tag=Tag.GROUP)
            self.board.leave()
            part.Free()
            group.Free()
            self._subsets[chosen, name] = MpiTransport(comm, members, self.board)
        return self._subsets[chosen, name]

    def nodes(self) -> tuple[Node, ...]:
        """The nodes by `neighbours`, in the order of their first ranks."""
        if self._nodes is None:
            local = neighbours(self._mpi, self._comm)
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
        """`MPI_Abort` of the whole job; if that fails, this process ends in a while."""
        self.board.end_job()
        signal.alarm(_PATIENCE)  # whose default is to kill
        self._mpi.COMM_WORLD.Abort(code)
