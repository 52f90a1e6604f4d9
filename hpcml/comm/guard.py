"""No rank is left behind: refusals and interrupts that concern the whole job.

`agree` lets all ranks refuse bad input together, `refuse` prints such an error once and ends the
ranks, and `StopFlag` turns Ctrl-C into a stop between two steps. Crashes: see `hpcml.comm.crash`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeVar

import numpy as np

from hpcml.comm.axis import Axis
from hpcml.comm.crash import CrashHook, installed
from hpcml.comm.launch import read
from hpcml.comm.running import RunningSums, running_sums
from hpcml.comm.world import world
from hpcml.errors import UserError

T = TypeVar("T")


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
    """Print the report of a user's error, once for all ranks that fail alike; the exit code.

    For the end of a command line: `except UserError as error: return refuse(error)`. Ends the job
    if only some ranks fail (see `leave`).
    """
    hook = _join()
    # Copies that are no world can only be told apart by the launcher's word.
    speaks = hook.board.sheet.take() if hook else read().rank in (None, 0)
    if speaks:
        sys.stdout.flush()
        sys.stderr.write(f"hpcml: error: {error.report()}\n")
        sys.stderr.flush()
    return leave(error.exit_code)


def leave(code: int, patience: float = 5.0) -> int:
    """The exit code with which this rank ends; if it fails alone, the job ends with it.

    A rank that ends with another code than 0 while others go on would leave them waiting: unless
    all ranks come here within `patience` seconds, the job is aborted with this code.
    """
    hook = _join()
    if code and hook and not hook.transport.barrier_within(patience):
        hook.transport.abort(code)
    return code


def _join() -> CrashHook | None:
    """The hook of the job of several ranks that this process belongs to, which it enters if needed.

    A rank that ends without having entered MPI would leave the others waiting for it in there.
    """
    if not installed():
        with suppress(UserError):  # no world to enter: then there is nobody who waits
            world()
    return installed()


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
        self._asked: RunningSums | None = None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def agreed(self, axis: Axis, late: int = 0) -> bool:
        """Whether any rank of the axis was asked to stop. One small all-reduce.

        `late`: as it was so many calls ago, so that ranks which may run apart do not wait here.
        """
        asked = self.signal is not None
        if late == 0:
            return bool(axis.allreduce(np.array([asked], np.uint8), "max")[0])
        if self._asked is None:
            self._asked = running_sums(axis, 1, np.float32, late + 1)
        self._asked.add(np.zeros(1, np.float32), asked)
        if len(self._asked) <= late:
            return False
        heard = bool(self._asked.first()[1].any())
        self._asked.drop()
        return heard

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
