"""Operations that go on while the caller computes, and the thread that carries them out.

No MPI library progresses a long collective by itself; a thread that runs the blocking operation
does. Each axis has a thread and a communicator of its own, so that its operations happen in the
order in which they were started, whatever other axes do.
"""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

from hpcml import memory
from hpcml.comm.ambient import here
from hpcml.comm.positions import is_program, place_of
from hpcml.comm.transport import Pending, Transport
from hpcml.errors import UserError

_PATIENCE = 20.0
"""Seconds that a rank stays, at its end, for operations which nobody has waited for."""


class Request(ABC):
    """An operation that was started: `wait()` gives what its blocking form returns."""

    @abstractmethod
    def wait(self) -> Any:
        """Return the result once there is one. May be called again.

        Raises what the operation raised, with a note of the calls that had started it.
        """

    @abstractmethod
    def test(self) -> bool:
        """Whether `wait` would return (or raise) at once."""


class Done(Request):
    """One that was over at once."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def wait(self) -> Any:
        """The result."""
        return self.result

    def test(self) -> bool:
        """True."""
        return True


class Origin:
    """Where an operation was started; the frames themselves would keep arrays alive."""

    def __init__(self, frame: FrameType | None) -> None:
        self.place = place_of(frame)
        """File and line of the program, for reports."""
        self._lines: list[tuple[CodeType, int]] = []
        while frame is not None:
            if is_program(frame):
                self._lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back

    def note(self, error: BaseException) -> None:
        """Add to an error the calls that led here, outermost first."""
        lines = [
            f'\n  File "{code.co_filename}", line {line}, in {code.co_name}'
            for code, line in reversed(self._lines)
        ]
        error.add_note("The operation was started at:" + "".join(lines))


_OnWay = tuple[Pending, Callable[[], Any], Callable[[], AbstractContextManager[None]]]


class Message(Request):
    """A message on its way, and what to do when it is there."""

    def __init__(
        self,
        pending: Pending,
        finish: Callable[[], Any],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`finish()` gives the result; this rank waits within `waiting()`."""
        # All that holds the arrays; let go when they have come or gone.
        self._on_way: _OnWay | None = (pending, finish, waiting)
        self._origin = Origin(sys._getframe(1))
        self._result: Any = None
        self._error: Exception | None = None

    def wait(self) -> Any:
        """The result, once the message has gone or come."""
        if not self.test() and self._on_way is not None:
            with self._on_way[2]():
                self._look(_wait)
        if self._error is not None:
            raise self._error
        return self._result

    def test(self) -> bool:
        """Whether the message has gone or come."""
        if self._on_way is not None:
            self._look(_test)
        return self._on_way is None

    def _look(self, over: Callable[[Pending], bool]) -> None:
        assert self._on_way is not None
        pending, finish, _ = self._on_way
        try:
            if over(pending):
                self._result, self._on_way = finish(), None
        except Exception as error:  # noqa: BLE001 (`wait` raises it)
            self._origin.note(error)
            self._error, self._on_way = error, None


def _wait(pending: Pending) -> bool:
    pending.wait()
    return True


def _test(pending: Pending) -> bool:
    return pending.test()


class Task(Request):
    """A call that the communication thread makes for the thread that starts it.

    Memory that it takes counts in the account of that one, as it would had that one called.
    """

    def __init__(self, call: Callable[[], Any], origin: Origin) -> None:
        self.origin = origin
        self._standing = memory.standing()
        self.error: BaseException | None = None
        """What the call raised."""
        self.told = False
        """Whether somebody has asked for the outcome."""
        self._call: Callable[[], Any] | None = call
        self._over = threading.Event()
        self._result: Any = None

    def run(self, earlier: BaseException | None) -> None:
        """Make the call, unless an earlier one has failed. By the thread only."""
        assert self._call is not None
        here.place = self.origin.place
        memory.stand_in(self._standing)
        try:
            if isinstance(earlier, UserError):
                self.error = earlier  # what was refused, whoever waits for it first
            elif earlier is not None:
                raise RuntimeError("an earlier operation of this axis failed") from earlier
            else:
                self._result = self._call()
        except BaseException as error:  # noqa: BLE001 (the caller gets it, whatever it is)
            self.origin.note(error)
            self.error = error
        self._call = None  # frees what the call holds
        self._over.set()

    def wait(self) -> Any:
        """The result, once the thread has it."""
        self._over.wait()
        self.told = True
        if self.error is not None:
            raise self.error
        return self._result

    def test(self) -> bool:
        """Whether the thread is done with it."""
        return self._over.is_set()


_workers: WeakKeyDictionary[Transport, Worker] = WeakKeyDictionary()


def worker_of(transport: Transport, name: str) -> Worker:
    """The communication thread of a transport, the same each time.

    Axes of several meshes may have the same ranks and so the same transport: with a thread each,
    their operations would take place in another order on every rank.
    """
    if transport not in _workers:
        worker = _workers[transport] = Worker(name)
        weakref.finalize(transport, worker.close)
    return _workers[transport]


class Worker:
    """A communication thread with its queue.

    It belongs to the rank that makes it. After an operation that failed it makes no other, since
    the ranks may no longer agree on what comes next.
    """

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._failed: Task | None = None
        self._rank = here.rank
        # A daemon: a process that ends by an error must not wait for a collective that never comes.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        if self._rank is None:
            atexit.register(self._end_with_process)
        else:
            self._rank.at_end.append(self.end)

    def submit(self, call: Callable[[], Any]) -> Task:
        """Have the thread make this call after all earlier ones; raises like `check`."""
        self.check()
        task = Task(call, Origin(sys._getframe(1)))
        self._tasks.put(task)
        return task

    def check(self) -> None:
        """Raise the error of an operation for which nobody has waited, once."""
        failed = self._failed
        if failed is not None and not failed.told:
            assert failed.error is not None
            failed.error.add_note("Nobody had waited for it until now.")
            failed.wait()

    def close(self) -> None:
        """Let the thread end after the operations that were started: its transport is gone."""
        self._tasks.put(None)

    def end(self) -> None:
        """End the thread and wait until it has; raises like `check`."""
        self.close()
        self._thread.join(_PATIENCE)
        self.check()

    def _end_with_process(self) -> None:
        try:
            self.end()
        except BaseException as error:  # noqa: BLE001 (too late to be raised)
            sys.excepthook(type(error), error, error.__traceback__)

    def _serve(self) -> None:
        here.rank = self._rank
        while (task := self._tasks.get()) is not None:
            task.run(self._failed.error if self._failed else None)
            if task.error is not None and self._failed is None:
                self._failed = task
            del task  # its arrays are nobody's while the thread waits for another
