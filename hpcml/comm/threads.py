"""Ranks as threads of one process: the same program, without MPI."""

from __future__ import annotations

import ctypes
import itertools
import math
import platform
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from hpcml.comm.ambient import Rank, here
from hpcml.comm.faults import Fault, Faults
from hpcml.comm.mailbox import Space, ThreadTransport
from hpcml.comm.positions import ThreadBoard
from hpcml.comm.transport import Node
from hpcml.comm.watch import limit

T = TypeVar("T")

_LOOK = 0.05
"""Seconds after which whoever waits looks whether the job has failed."""
_GRACE = 1.0
"""Seconds for the other ranks to notice that the job has failed, before they are interrupted."""
_TIMES = 3
"""How often they are told to end: what is raised in a `__del__` is ignored there."""


class OtherRankFailed(RuntimeError):
    """What wakes a rank when another one has failed; `hpcml.run` raises the other one's error."""


def run(
    function: Callable[..., T],
    *args: Any,
    ranks: int = 4,
    nodes: Sequence[int] | None = None,
    timeout: float | None = None,
    faults: Sequence[Fault] = (),
) -> list[T]:
    """Call `function(*args)` once for each of `ranks` ranks, and return the results by rank.

    Each rank is a thread of this process, so no MPI is needed: for notebooks, debuggers, and tests
    at many rank counts. Inside, `hpcml.Mesh` lays out these ranks, and a program written for
    `mpiexec` runs unchanged:

        def sums(scale):
            dp = hpcml.Mesh()["dp"]
            return dp.allreduce(np.full(3, scale * (dp.rank + 1)))

        hpcml.run(sums, 10, ranks=3)     # three times array([60, 60, 60])

    Random seed, `no_grad` and the memory account belong to the thread: each rank begins with those
    of a new process. Everything else is shared, so make models and data within the function.
    Compiled kernels and BLAS run side by side; Python itself runs one thread at a time, so this is
    no way to be fast.

    `nodes`: the node that each rank pretends to be on, for algorithms that look (`[0, 0, 1, 1]`).
    `timeout`: seconds that a rank may wait for others (0: no limit; default: `HPCML_TIMEOUT`, which
    is 300 if not set).
    `faults`: what is to go wrong, see `hpcml.comm.faults`.

    If a rank raises, the others are woken and its exception is raised here, with a note that says
    which rank it was and where the others were. A wait that is too long raises `TimeoutError`,
    which lists where all ranks are and who is missing. Raises `ValueError` for impossible options.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: start at least 1")
    places = [0] * ranks if nodes is None else list(nodes)
    if len(places) != ranks:
        raise ValueError(
            f"nodes={places} names {len(places)} nodes for {ranks} ranks: one for each"
        )
    results: dict[int, T] = {}

    def be(rank: int) -> None:
        results[rank] = function(*args)

    seconds = limit() if timeout is None else timeout or math.inf
    _Job(be, places, seconds, Faults(faults)).run()
    return [results[rank] for rank in range(ranks)]


class _Job:
    """The ranks of one `run`, as a `hpcml.comm.mailbox.Job`."""

    def __init__(
        self, be: Callable[[int], None], places: Sequence[int], seconds: float, faults: Faults
    ) -> None:
        """A job in which `be(rank)` is called on each rank."""
        host = platform.node()
        hosts = {place: f"{host}-{place}" if len(set(places)) > 1 else host for place in places}
        self.nodes = tuple(Node(hosts[place], place, 0, 0) for place in places)
        self._threads = [
            threading.Thread(
                target=self._run, args=(be, rank), name=f"hpcml-rank-{rank}", daemon=True
            )
            for rank in range(len(places))
        ]
        # Not by joining: an interrupt of `Thread.join` marks a thread that runs on as ended (3.11).
        self._ended = [threading.Event() for _ in places]
        self.boards: Sequence[ThreadBoard] = [
            ThreadBoard(thread, partial(self._begin_call, rank))
            for rank, thread in enumerate(self._threads)
        ]
        self.synchronous = faults.synchronous
        self.post = faults.post
        self._faults = faults
        self._limit = seconds
        self._lock = threading.Lock()
        self._spaces: dict[Space.Key, Space] = {}
        self._failure: BaseException | None = None
        self._origin = ""

    def run(self) -> None:
        """Start the ranks and wait until they end; raise the first failure."""
        try:
            for thread in self._threads:
                thread.start()
            self._join()
        finally:
            self._faults.close()
        if self._failure is not None:
            raise self._failure
        self._faults.check()

    def space(self, key: Space.Key, size: int) -> Space:
        """The message space of this key."""
        with self._lock:
            return self._spaces.setdefault(key, Space(size))

    def check(self) -> None:
        """Raise if the job has failed."""
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise OtherRankFailed(f"{self._origin} failed: {kind}: {self._failure}")

    def wait(self, event: threading.Event, rank: int, members: Sequence[int]) -> None:
        """Wait for others; raise if the job fails, and fail it if this takes too long."""
        self._wait(event, rank, members, self._limit)

    def abort(self, rank: int, code: int) -> None:
        """Fail the job."""
        self._fail(f"rank {rank}", RuntimeError(f"rank {rank} ended the job with code {code}"))
        self.check()

    def _run(self, be: Callable[[int], None], rank: int) -> None:
        board = self.boards[rank]
        here.rank = Rank(ThreadTransport(self, range(len(self.boards)), rank))
        # What is to be done at the end is only known then, and is to be done whatever happens.
        first: list[Callable[[], None]] = [partial(be, rank)]
        try:
            for act in itertools.chain(first, here.rank.at_end):
                try:
                    act()
                except BaseException as error:  # noqa: BLE001 (`run` raises it, whatever it is)
                    board.end = f"has raised {type(error).__name__}"
                    self._fail(f"rank {rank}", error)
            board.end = board.end or "has ended"
        finally:
            self._ended[rank].set()

    def _fail(self, origin: str, error: BaseException) -> None:
        """Note the failure, unless there has been one: the others are its consequence."""
        with self._lock:
            if self._failure is None:
                self._origin = origin
                if not isinstance(error, TimeoutError):
                    error.add_note(f"{origin} of {len(self.boards)} failed. {self._roll_call()}")
                self._failure = error

    def _wait(
        self, event: threading.Event, rank: int, members: Sequence[int], seconds: float
    ) -> None:
        end = time.monotonic() + seconds
        while not event.wait(max(0.0, min(_LOOK, end - time.monotonic()))):
            self.check()
            if time.monotonic() >= end:
                error = TimeoutError(self._late(rank, members, seconds))
                self._fail(f"rank {rank}", error)
                if self._failure is error:
                    raise error

    def _begin_call(self, rank: int, operation: str) -> None:
        # A rank that stops waits longer than the others do for it: they are to find out.
        never, all_ranks = threading.Event(), range(len(self.boards))
        self._faults.call(
            rank, operation, lambda: self._wait(never, rank, all_ranks, 2 * self._limit)
        )

    def _late(self, rank: int, members: Sequence[int], seconds: float) -> str:
        mine = self.boards[rank].call()
        text = f"rank {rank} waited for other ranks longer than {seconds:g} s. {self._roll_call()}"
        if mine is None or not mine.sequence:
            return text
        missing = [
            str(member)
            for member in members
            if not any(mine.meets(call) for call in self.boards[member].calls())
        ]
        return f"{text}\nMissing in {mine.operation} #{mine.sequence}: rank {', '.join(missing)}"

    def _roll_call(self) -> str:
        lines = [f"\n  rank {rank}: {board}" for rank, board in enumerate(self.boards)]
        return "Where the ranks are:" + "".join(lines)

    def _join(self) -> None:
        """Wait for all ranks; once the job has failed, no longer than it takes to end them."""
        try:
            for ended in self._ended:
                while self._failure is None and not ended.wait(_LOOK):
                    pass
        except KeyboardInterrupt as error:
            self._fail("the caller", error)
        for _ in range(_TIMES):
            if self._all_end_within(_GRACE):
                return
            for thread in self._threads:  # those that compute, and would not look for long
                _raise_in(thread, OtherRankFailed)
        if not self._all_end_within(_GRACE):
            assert self._failure is not None, "ranks go on only after a failure"
            self._failure.add_note(f"Some ranks could not be ended. {self._roll_call()}")

    def _all_end_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return all(ended.wait(max(0.0, end - time.monotonic())) for ended in self._ended)


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Have a thread raise an error between two instructions of Python."""
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(error))
