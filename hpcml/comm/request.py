"""Operations that go on while the caller computes, and the thread that carries them out.

No MPI library progresses a long collective by itself; a thread that runs the blocking operation
does. Each axis has a thread and a communicator of its own, so that its operations happen in the
order in which they were started, whatever other axes do.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from hpcml.comm.transport import Pending

Stack = list[tuple[str, int, str]]


class Request:
    """An operation that was started: `wait()` gives what its blocking form returns."""

    def wait(self) -> Any:
        """Return the result once there is one. May be called again.

        Raises what the operation raised, with the place that had started it.
        """
        raise NotImplementedError

    def test(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        raise NotImplementedError


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


class Message(Request):
    """A message on its way, and what to do when it is there."""

    def __init__(self, pending: Pending, finish: Callable[[], Any]) -> None:
        self._pending: Pending | None = pending
        self._finish = finish
        self._result: Any = None

    def wait(self) -> Any:
        """The result, once the message has gone or come."""
        if self._pending is not None:
            self._pending.wait()
            self._end()
        return self._result

    def test(self) -> bool:
        """Whether the message has gone or come."""
        if self._pending is not None and self._pending.test():
            self._end()
        return self._pending is None

    def _end(self) -> None:
        self._result, self._pending = self._finish(), None


class Task(Request):
    """A call that the communication thread makes."""

    def __init__(self, call: Callable[[], Any], started: Stack) -> None:
        self._call: Callable[[], Any] | None = call
        self._started = started
        self._over = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self, earlier: BaseException | None) -> BaseException | None:
        """Make the call, unless an earlier one failed; the error, if any. By the thread only."""
        assert self._call is not None
        try:
            if earlier is not None:
                raise RuntimeError("an earlier operation of this axis failed") from earlier
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 (the caller gets it, whatever it is)
            self._error = error
        self._call = None  # frees what the call holds
        self._over.set()
        return self._error

    def wait(self) -> Any:
        """The result, once the thread has it."""
        self._over.wait()
        if self._error is not None:
            if not getattr(self._error, "__notes__", None):
                place = "".join(f'\n  File "{f}", line {n}, in {name}' for f, n, name in self._started)
                self._error.add_note(f"The operation was started at:{place}")
            raise self._error
        return self._result

    def test(self) -> bool:
        """Whether the thread is done with it."""
        return self._over.is_set()


class Worker:
    """A communication thread with its queue."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        # A daemon: a process that ends by an error must not wait for a collective that never comes.
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> Task:
        """Have the thread make this call after all earlier ones."""
        task = Task(call, _stack())
        self._tasks.put(task)
        return task

    def _serve(self) -> None:
        failed: BaseException | None = None
        while True:
            failed = self._tasks.get().run(failed) or failed


def _stack() -> Stack:
    """Where the caller of this module's caller is; frames themselves would keep arrays alive."""
    frame = sys._getframe(3)
    places: Stack = []
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return places[::-1]
