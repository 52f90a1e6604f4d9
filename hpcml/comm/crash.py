"""A crash on one rank ends the job: it would leave the others waiting for ever."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import threading
import time
import traceback
import uuid
from types import TracebackType

import numpy as np

from hpcml.comm.algorithms import find
from hpcml.comm.link import Link
from hpcml.comm.transport import Transport

_GRACE = 1.0
"""Seconds in which the rank that reports first ends the job before another one ends it too."""


def install(transport: Transport) -> None:
    """End the whole job when an exception is not caught on any rank or thread. Collective.

    The traceback is printed once, with the rank: by the first of the ranks of a node that fail, and
    the ranks of the first node are given the lead. `world` does this for every job of several
    ranks; a second call changes nothing.
    """
    if installed():
        return
    hook = CrashHook(transport, Claim(transport))
    sys.excepthook = hook
    threading.excepthook = hook.on_thread


class Claim:
    """A right that one rank of a node gets, once: who writes to a shared file first has it.

    The file is deleted as soon as all have opened it, so nothing is left behind.
    """

    def __init__(self, transport: Transport) -> None:
        token = np.frombuffer(uuid.uuid4().bytes, np.uint8).copy()
        if transport.size > 1:
            find("broadcast", "binomial").run(Link(transport), token, 0)
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


class CrashHook:
    """`sys.excepthook` of a rank: report once, then end the job."""

    def __init__(self, transport: Transport, claim: Claim) -> None:
        self.transport = transport
        self.claim = claim
        self._node = transport.nodes()[transport.rank]

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Report this exception of the main thread, then end the job."""
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


def installed() -> CrashHook | None:
    """The hook of this process, if it is a rank of a job of several."""
    return sys.excepthook if isinstance(sys.excepthook, CrashHook) else None
