"""The stand-in's streams and copies to and from pinned memory, which happen when waited for.

What a real device does at some time before somebody waits for it happens here as late as can be, so
that who forgets to wait, or lets go of memory too early, gets wrong values. Kernels run at once.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.device.standin import order

count: Counter[str] = Counter()
"""How often the host has waited ("syncs"), of that to read a value ("reads") or for all that the
device does ("whole device"), and pinned copies "to host" and "from host"."""
_lock = threading.Lock()


def syncs() -> int:
    """How often the host has waited for the device."""
    return count["syncs"]


def here() -> Counter[str]:
    """The counts of this thread."""
    return Counter(_here.count)


def noted(what: str) -> None:
    """Count this once more."""
    _here.count[what] += 1
    with _lock:
        count[what] += 1


def read(array: np.ndarray[Any, Any]) -> None:
    """Wait for values."""
    noted("syncs")
    noted("reads")
    touch(array)
    current().waited_for()


def touch(array: np.ndarray[Any, Any], write: bool = False) -> None:
    """The current stream reads these elements, or writes them."""
    if order.active:
        order.active.touch(array, current().ptr, write)


_numbers = itertools.count(1)


class Stream:
    """A stream: copies that are to be made."""

    null: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ptr = next(_numbers)
        self.queue: list[Callable[[], None]] = []
        self._before: list[Stream] = []

    def synchronize(self) -> None:
        """Wait."""
        noted("syncs")
        self.run(len(self.queue))
        self.waited_for()

    def waited_for(self) -> None:
        """The host comes after what was started."""
        if order.active:
            order.active.wait_by_host(order.active.now(self.ptr))

    def run(self, number: int) -> None:
        """Make the first copies."""
        for copy in self.queue[:number]:
            copy()
        del self.queue[:number]

    def wait_event(self, event: Any) -> None:
        """Let what follows wait, not the host."""
        event.pass_by()
        if order.active:
            order.active.wait(self.ptr, event.clock)

    def record(self, event: Any = None) -> Any:
        """An event after what was started."""
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._before.append(current())
        _here.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.stream = self._before.pop()


class _Here(threading.local):
    def __init__(self) -> None:
        self.stream, self.count = Stream(), Counter[str]()


_here = _Here()


def current() -> Stream:
    """The stream of this thread."""
    return _here.stream


class Event:
    """A place in a stream."""

    done = True

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Stream | None = None
        self._last: Callable[[], None] | None = None
        self.clock: order.Clock = {}
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Put it there."""
        self.seconds = time.perf_counter()
        self._stream = stream or current()
        self._last = self._stream.queue[-1] if self._stream.queue else None
        if order.active:
            self.clock = order.active.now(self._stream.ptr)

    def synchronize(self) -> None:
        """Wait."""
        noted("syncs")
        self.pass_by()
        if order.active:
            order.active.wait_by_host(self.clock)

    def pass_by(self) -> None:
        """What came before has happened."""
        if self._stream is not None and self._last in self._stream.queue:
            self._stream.run(self._stream.queue.index(self._last) + 1)


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds from one event to another."""
    return 1e3 * (end.seconds - start.seconds)


class _Pinned(np.ndarray[Any, Any]):
    """Pinned memory; when it is given back, others write there."""


def alloc_pinned_memory(nbytes: int) -> Any:
    """Pinned memory of the host."""
    memory = np.full(nbytes, 0xEE, np.uint8)  # not what was there before, which may be right
    handle = memory.view(_Pinned)
    _kept.append(memory)
    weakref.finalize(handle, memory.fill, 0xEE)
    return handle


_kept: list[Any] = []


def copy(what: str, target: int, source: int, nbytes: int) -> None:
    """Start a copy on the current stream."""
    noted(what)
    for place in source, target:  # of which one is the device's
        touch(
            np.frombuffer((ctypes.c_ubyte * nbytes).from_address(place), np.uint8), place == target
        )
    current().queue.append(lambda: ctypes.memmove(target, source, nbytes) and None)
