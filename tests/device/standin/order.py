"""Who waits for whom: what streams read and write, and whether that was waited for.

What a stream is given comes after all that it was given before, that it was told to wait for, and
that the host has waited for by then. Within `watched` each byte knows who wrote and who read it
last. Whoever then reads what others have written, or writes what others have read or written,
without coming after them, fails: on a GPU it would find what it should only now and then.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

Clock = dict[int, int]
"""By stream, how many of its operations have happened."""

_STREAM = 1 << 40  # operation n of stream s is number s * _STREAM + n of all


class RaceError(AssertionError):
    """Nobody has waited."""


def _join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


class _Block:
    """Memory: who wrote each byte last, and who read it, by stream."""

    def __init__(self, nbytes: int, stream: int) -> None:
        self.stream = stream  # whose next allocation may have the same memory
        self.written = np.zeros(nbytes, np.int64)
        self.read: dict[int, Any] = {}


class Order:
    """What has happened so far."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self._lock = threading.RLock()
        self._host: Clock = {}
        self._clocks: dict[int, Clock] = {}
        self._starts: list[int] = []
        self._blocks: dict[int, _Block] = {}

    # --- memory ----------------------------------------------------------------------------------

    def allocate(self, start: int, nbytes: int, stream: int) -> None:
        """There is new memory, which nobody has written."""
        with self._lock:
            bisect.insort(self._starts, start)
            self._blocks[start] = _Block(nbytes, stream)

    def free(self, start: int) -> None:
        """Memory goes back to the pool, which gives it to its stream again without waiting.

        Told by `races` alone: an error would not get out of where it is called.
        """
        with self._lock:
            block = self._blocks.pop(start)
            self._starts.remove(start)
            if self is not active:
                return
            clock = self._now(block.stream)
            for last in (block.written, *block.read.values()):
                with contextlib.suppress(RaceError):
                    self._check(last, clock, f"stream {block.stream} gets memory back that")

    # --- operations ------------------------------------------------------------------------------

    def touch(self, array: np.ndarray[Any, Any], stream: int, write: bool) -> None:
        """The stream reads the elements of an array, or reads and writes them."""
        with self._lock:
            clock = self._now(stream)
            clock[stream] = clock.get(stream, 0) + 1
            block, place = self._found(array)
            if block is None:
                return
            what = f"stream {stream} {'writes' if write else 'reads'} what"
            self._check(place(block.written), clock, what)
            if write:
                for last in block.read.values():
                    self._check(place(last), clock, what)
                place(block.written)[...] = stream * _STREAM + clock[stream]
            else:
                if stream not in block.read:
                    block.read[stream] = np.zeros_like(block.written)
                place(block.read[stream])[...] = stream * _STREAM + clock[stream]

    def touch_by_host(self, array: np.ndarray[Any, Any]) -> None:
        """The host reads them, where they lie."""
        with self._lock:
            block, place = self._found(array)
            if block is not None:
                self._check(place(block.written), self._host, "the host reads what")

    def _found(self, array: np.ndarray[Any, Any]) -> tuple[_Block | None, Any]:
        """The block that an array lies in, and what gives of numbers by byte those of the array."""
        first = int(array.__array_interface__["data"][0])
        number = bisect.bisect_right(self._starts, first) - 1
        if not array.size or number < 0:
            return None, None
        start = self._starts[number]
        block = self._blocks[start]
        if first >= start + len(block.written):
            return None, None  # made before the watch

        def place(last: Any) -> Any:
            return np.lib.stride_tricks.as_strided(
                last[first - start :], (*array.shape, array.itemsize),
                (*[8 * stride for stride in array.strides], 8),
            )  # fmt: skip

        return block, place

    def _check(self, last: Any, clock: Clock, what: str) -> None:
        for operation in np.unique(last).tolist():
            stream, number = divmod(operation, _STREAM)
            if number > clock.get(stream, 0):
                race = f"{what} stream {stream} has used, without waiting for it"
                self.races.append(race)
                raise RaceError(race)

    # --- waits -----------------------------------------------------------------------------------

    def _now(self, stream: int) -> Clock:
        """The clock of a stream that is given something by the host now."""
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        return clock

    def now(self, stream: int) -> Clock:
        """What will have happened when a stream is done with what it has."""
        with self._lock:
            return dict(self._now(stream))

    def wait(self, stream: int, clock: Clock) -> None:
        """What the stream is given from now on comes after these operations."""
        with self._lock:
            _join(self._clocks.setdefault(stream, {}), clock)

    def wait_by_host(self, clock: Clock) -> None:
        """The host goes on after these operations."""
        with self._lock:
            _join(self._host, clock)


active: Order | None = None
"""The one that is told of everything."""


@contextlib.contextmanager
def watched() -> Iterator[Order]:
    """Within, whoever does not wait where it must fails."""
    global active
    before, active = active, Order()
    try:
        yield active
    finally:
        active = before
