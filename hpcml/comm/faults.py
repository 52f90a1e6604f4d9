"""What can go wrong in a job, on purpose: for tests of programs and of algorithms.

    hpcml.run(train, ranks=4, faults=[Delay(0.01), Synchronous()])

The first three leave results as they are; the others end the job with a message. Calls of
communication are counted from 1, for each rank, as they begin; making a mesh needs some as well.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpcml.comm.mailbox import Parcel

_TICK = 0.002
"""Seconds for which messages are gathered before they are put in another order."""


@dataclass(frozen=True)
class Delay:
    """Every message takes up to so many seconds longer, by chance, in order within its stream."""

    seconds: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Reorder:
    """Messages of different streams (source, tag, destination) arrive in any order."""

    seed: int = 0


@dataclass(frozen=True)
class Synchronous:
    """A send is done only when its receiver has begun: no program may rely on buffers."""


@dataclass(frozen=True)
class Stop:
    """A rank never comes to its call of this number."""

    rank: int
    call: int
    operation: str | None = None
    """Which calls are counted, by the name of the method (`"allreduce"`); None: all."""


@dataclass(frozen=True)
class Raise:
    """A rank raises an error instead of its call of this number."""

    rank: int
    call: int
    operation: str | None = None
    error: Exception = field(default_factory=lambda: RuntimeError("injected fault"))


@dataclass(frozen=True)
class WrongCount:
    """What a rank sends in its call of this number has half the length it should have."""

    rank: int
    call: int
    operation: str | None = None


Fault = Delay | Reorder | Synchronous | Stop | Raise | WrongCount


class Faults:
    """The faults of one job, at work."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.synchronous = any(isinstance(fault, Synchronous) for fault in faults)
        late = [fault for fault in faults if isinstance(fault, Delay | Reorder)]
        self._postman = _Postman(late) if late else None
        self._waiting = [fault for fault in faults if isinstance(fault, Stop | Raise | WrongCount)]
        self._calls: Counter[tuple[int, str | None]] = Counter()
        self._here = _Here()

    def call(self, rank: int, operation: str, stop: Callable[[], None]) -> None:
        """A rank begins a call; `stop()` keeps it there until the job fails."""
        self._here.cut = False
        self._calls.update([(rank, operation), (rank, None)])
        for fault in [fault for fault in self._waiting if self._is_due(fault, rank, operation)]:
            self._waiting.remove(fault)
            match fault:
                case Raise(error=error):
                    raise error
                case Stop():
                    stop()
                case WrongCount():
                    self._here.cut = True

    def post(self, parcel: Parcel) -> None:
        """Deliver a message, now or later, whole or not."""
        if self._here.cut:
            parcel.data = parcel.data[: parcel.data.size // 2]
        if self._postman is None:
            parcel.deliver()
        else:
            self._postman.post(parcel)

    def close(self) -> None:
        """End the thread that delivers."""
        if self._postman is not None:
            self._postman.close()

    def check(self) -> None:
        """Raise `ValueError` if a fault had no occasion: a test with it would prove nothing."""
        for fault in self._waiting:
            made = self._calls[fault.rank, fault.operation]
            raise ValueError(f"{fault} did not happen: rank {fault.rank} made {made} such calls")

    def _is_due(self, fault: Stop | Raise | WrongCount, rank: int, operation: str) -> bool:
        return (
            fault.rank == rank
            and fault.operation in (None, operation)
            and fault.call == self._calls[rank, fault.operation]
        )


class _Here(threading.local):
    cut = False


class _Postman:
    """A thread that delivers messages later than they were sent, in order within each stream."""

    def __init__(self, faults: Sequence[Delay | Reorder]) -> None:
        self._faults = faults
        self._lock = threading.Condition()
        self._bag: list[tuple[float, float, int, Parcel]] = []
        self._number = itertools.count()
        self._sent: Counter[object] = Counter()
        self._latest: dict[object, float] = defaultdict(float)
        self._closed = False
        self._thread = threading.Thread(target=self._walk, name="hpcml-postman", daemon=True)
        self._thread.start()

    def post(self, parcel: Parcel) -> None:
        """Take a message, to be delivered when its time has come."""
        parcel.keep()
        stream = (id(parcel.inbox), parcel.stream)
        with self._lock:
            self._sent[stream] += 1
            due, turn = time.monotonic(), 0.0
            for fault in self._faults:
                chance = _chance(fault.seed, parcel.stream, self._sent[stream])
                if isinstance(fault, Delay):
                    due += fault.seconds * chance
                else:
                    due, turn = math.ceil(due / _TICK) * _TICK, chance
            if due <= self._latest[stream]:  # after those before it, whatever chance says
                due, turn = self._latest[stream], math.inf
            self._latest[stream] = due
            heapq.heappush(self._bag, (due, turn, next(self._number), parcel))
            self._lock.notify()

    def close(self) -> None:
        """End; what is not delivered by now nobody waits for."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _walk(self) -> None:
        with self._lock:
            while not self._closed:
                wait = self._bag[0][0] - time.monotonic() if self._bag else None
                if wait is None or wait > 0:
                    self._lock.wait(wait)
                else:
                    heapq.heappop(self._bag)[-1].deliver()


def _chance(*what: object) -> float:
    """A number in [0, 1) that depends on these values alone."""
    return zlib.crc32(repr(what).encode()) / 2**32
