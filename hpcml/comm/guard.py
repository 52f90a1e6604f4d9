"""No rank is left behind: crashes, refusals and interrupts that concern the whole job.

An uncaught exception on one rank would leave the others waiting in their next collective for ever.
`install` makes it end the job, `agree` lets all ranks refuse bad input together, `refuse` prints
such an error once and ends the ranks, and `StopFlag` turns Ctrl-C into a stop between two steps.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hpcml.comm.launch import read
from hpcml.comm.transport import Transport
from hpcml.errors import UserError

if TYPE_CHECKING:
    from hpcml.comm.axis import Axis

T = TypeVar("T")

_GRACE = 1.0
"""Seconds in which the rank that reports first ends the job before another one ends it too."""


def install(transport: Transport) -> None:
    """End the whole job when an exception is not caught on any rank or thread. Collective.

    The traceback is printed once, with the rank: by the first of the ranks of a node that fail, and
    the ranks of the first node are given the lead. `world` does this for every job of several
    ranks; a second call changes nothing.
    """
    if _installed():
        return
    hook = _Hook(transport, _Claim(transport))
    sys.excepthook = hook
    threading.excepthook = hook.on_thread


class _Claim:
    """A right that one rank of a node gets, once: who writes to a shared file first has it.

    The file is deleted as soon as all have opened it, so nothing is left behind.
    """

    def __init__(self, transport: Transport) -> None:
        token = np.frombuffer(uuid.uuid4().bytes, np.uint8).copy()
        transport.broadcast(token, 0)
        path = os.path.join(tempfile.gettempdir(), f"hpcml-{token.tobytes().hex()}.claim")
        self._file: int | None
        try:
            self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # no temporary folder: better a report from each rank than none
            self._file = None
        transport.barrier()
        if self._file is not None and transport.nodes()[transport.rank].local_rank == 0:
            os.unlink(path)

    def take(self) -> bool:
        """Whether this rank is the first of its node to ask."""
        if self._file is None:
            return True
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if os.fstat(self._file).st_size:
                return False
            os.write(self._file, b"1")
            return True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


class _Hook:
    """`sys.excepthook` of a rank: report once, then end the job."""

    def __init__(self, transport: Transport, claim: _Claim) -> None:
        self.transport = transport
        self.claim = claim
        self._node = transport.nodes()[transport.rank]

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace, "")

    def on_thread(self, failure: threading.ExceptHookArgs) -> None:
        """`threading.excepthook`: a thread that dies ends the job too, or others wait for it."""
        if failure.exc_type is SystemExit or failure.exc_value is None:
            return
        name = f" in thread {failure.thread.name}" if failure.thread else ""
        self._end(failure.exc_type, failure.exc_value, failure.exc_traceback, name)

    def _end(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
        thread: str,
    ) -> None:
        if self._node.index > 0:
            time.sleep(_GRACE / 2)  # ranks of all nodes often fail alike: let the first node speak
        if self.claim.take():
            where = f"rank {self.transport.rank} ({self._node.host}){thread}"
            if issubclass(kind, KeyboardInterrupt):
                report = f"{where}: interrupted\n"
            else:
                text = "".join(traceback.format_exception(kind, error, trace))
                report = f"{where} failed and ends the job:\n{text}"
            sys.stdout.flush()
            sys.stderr.write(report)
            sys.stderr.flush()
            # The launcher forwards output on its own: let it do so before the job is torn down.
            time.sleep(_GRACE / 10)
        else:
            time.sleep(_GRACE)
        code = 130 if issubclass(kind, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        self.transport.abort(code)


def agree(axis: Axis, function: Callable[[], T]) -> T:
    """Call `function` on every rank of the axis; if one refuses with a `UserError`, all do.

    Returns the result of this rank. Otherwise all ranks raise the error of the lowest rank that
    failed, whose message names that rank unless all ranks failed alike: no rank goes on into a
    collective that the others do not reach. Other exceptions pass, and end the job.
    """
    result: T | None = None
    failure: tuple[type[UserError], str] | None = None
    try:
        result = function()
    except UserError as error:
        failure = (type(error), str(error))
    failed = np.array([failure is not None], np.uint8)
    if axis.allreduce(failed, "max")[0]:
        failures = axis.allgather_object(failure)
        rank = next(rank for rank, found in enumerate(failures) if found is not None)
        kind, message = failures[rank] or (UserError, "")
        alike = all(found == failures[rank] for found in failures)
        raise kind(message if alike else f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


def refuse(error: UserError) -> int:
    """Print the one line of a user's error, once for all ranks that fail alike; the exit code.

    For the end of a command line: `except UserError as error: return refuse(error)`. Ends the job
    if only some ranks fail (see `leave`).
    """
    hook = _installed()
    # Before there is MPI to agree by, the launcher's word tells the ranks apart.
    speaks = hook.claim.take() if hook else read().rank in (None, 0)
    if speaks:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
    return leave(error.exit_code)


def leave(code: int, patience: float = 5.0) -> int:
    """The exit code with which this rank ends; if it fails alone, the job ends with it.

    A rank that ends with another code than 0 while others go on would leave them waiting: unless
    all ranks come here within `patience` seconds, the job is aborted with this code.
    """
    hook = _installed()
    if code and hook and not hook.transport.barrier_within(patience):
        hook.transport.abort(code)
    return code


def _installed() -> _Hook | None:
    return sys.excepthook if isinstance(sys.excepthook, _Hook) else None


class StopFlag:
    """Ctrl-C and SIGTERM as a request to stop at the end of the step.

    Within `with StopFlag() as stop:` the first signal sets `stop.signal`, and a second one raises
    `KeyboardInterrupt`. Python handles signals between its own instructions only, and not every
    rank gets one, hence `stop.agreed(axis)` at the end of a step. Only the main thread can receive
    signals; elsewhere the flag is never set.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def agreed(self, axis: Axis) -> bool:
        """Whether any rank of the axis was asked to stop. One small all-reduce."""
        return bool(axis.allreduce(np.array([self.signal is not None], np.uint8), "max")[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
