"""A crash on one rank ends the job: it would leave the others waiting for ever."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from types import TracebackType

from hpcml.comm.noted import NodeBoard
from hpcml.comm.sheet import FAILED
from hpcml.comm.transport import Transport

_GRACE = 1.0
"""Seconds in which the rank that reports first ends the job before another one ends it too."""


def install(transport: Transport, board: NodeBoard) -> None:
    """End the whole job when an exception is not caught on any rank or thread.

    The traceback is printed once, with the rank: by the first of the ranks of a node that fail, and
    the ranks of the first node are given the lead. `world` does this for every job of several
    ranks; a second call changes nothing.
    """
    if installed():
        return
    hook = CrashHook(transport, board)
    sys.excepthook = hook
    threading.excepthook = hook.on_thread


class CrashHook:
    """`sys.excepthook` of a rank: report once, then end the job."""

    def __init__(self, transport: Transport, board: NodeBoard) -> None:
        self.transport = transport
        self.board = board
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
        self.board.mark(FAILED)
        if self._node.index > 0:
            time.sleep(_GRACE / 2)  # ranks of all nodes often fail alike: let the first node speak
        if self.board.sheet.take():
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
