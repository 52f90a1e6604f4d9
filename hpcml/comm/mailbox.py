"""Messages among threads of one process: a `Transport` without MPI.

Each rank has an inbox. A message is copied straight into the receiver's buffer if the receiver
waits for it already, and kept as a copy until it asks otherwise.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcml.backend import put
from hpcml.comm.alone import Alone
from hpcml.comm.board import Board
from hpcml.comm.positions import ThreadBoard
from hpcml.comm.staging import on_device
from hpcml.comm.transport import Array, Node, Pending, Transport, Vendor, wrong_length

Stream = tuple[int, int]
"""Source and tag: what keeps its order."""


class Job(Protocol):
    """What the threads of a job share, as its transports see it."""

    nodes: tuple[Node, ...]
    boards: Sequence[ThreadBoard]
    synchronous: bool
    """Sends are done only when the other rank has begun to receive."""

    def space(self, key: Space.Key, size: int) -> Space:
        """The message space of this key, the same for all its ranks."""

    def check(self) -> None:
        """Raise if the job has failed."""

    def wait(self, event: threading.Event, rank: int, members: Sequence[int]) -> None:
        """Wait for others of these members; raise if the job fails or the wait is too long."""

    def post(self, parcel: Parcel) -> None:
        """Deliver a message, now or later."""

    def abort(self, rank: int, code: int) -> None:
        """End the job."""


class Message:
    """One end of a message: done when the other end has met it."""

    def __init__(self, transport: ThreadTransport, buffer: Array) -> None:
        self.buffer = buffer
        self.event = threading.Event()
        self.error: ValueError | None = None
        self._transport = transport

    def wait(self) -> None:
        """Return when the ends have met."""
        self._transport.wait(self.event)
        if self.error is not None:
            raise self.error

    def test(self) -> bool:
        """Whether the ends have met."""
        if self.event.is_set():
            self.wait()
            return True
        self._transport.job.check()
        return False


class _Buffered:
    """A send that was copied: done at once."""

    def wait(self) -> None:
        """Return."""

    def test(self) -> bool:
        """True."""
        return True


_BUFFERED = _Buffered()


@dataclass
class Parcel:
    """A message between its ends."""

    inbox: _Inbox
    stream: Stream
    data: Array
    sender: Message | None
    """Waits until the message is met, if it is synchronous; then the buffer is the sender's own."""

    def keep(self) -> None:
        """Let the sender use its buffer again, unless it waits."""
        if self.sender is None:
            self.data = self.data.copy()
            _settled(self.data)

    def deliver(self) -> None:
        """Put the message into the inbox."""
        self.inbox.put(self)

    def meet(self, receiver: Message) -> None:
        """Give the message to the one that asked for it."""
        if self.data.size == receiver.buffer.size:
            put(self.data, receiver.buffer)
            _settled(receiver.buffer)
        else:
            receiver.error = wrong_length(self.data.size, receiver.buffer.size, *self.stream)
        receiver.event.set()
        if self.sender is not None:
            self.sender.event.set()


class _Inbox:
    """What has come to a rank, and what it waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._come: dict[Stream, deque[Parcel]] = defaultdict(deque)
        self._awaited: dict[Stream, deque[Message]] = defaultdict(deque)

    def put(self, parcel: Parcel) -> None:
        """A message comes."""
        with self._lock:
            if self._awaited[parcel.stream]:
                parcel.meet(self._awaited[parcel.stream].popleft())
            else:
                parcel.keep()
                self._come[parcel.stream].append(parcel)

    def ask(self, stream: Stream, receiver: Message) -> None:
        """The rank begins to receive."""
        with self._lock:
            if self._come[stream]:
                self._come[stream].popleft().meet(receiver)
            else:
                self._awaited[stream].append(receiver)


class Space:
    """The inboxes and the barrier of a group of ranks, which other groups do not reach."""

    Key = tuple[object, ...]

    def __init__(self, size: int) -> None:
        self.inboxes = [_Inbox() for _ in range(size)]
        self._lock = threading.Lock()
        self._here: list[threading.Event] = []

    def arrive(self) -> threading.Event:
        """Come to the barrier; the event tells that all ranks have."""
        event = threading.Event()
        with self._lock:
            self._here.append(event)
            if len(self._here) == len(self.inboxes):
                for waiting in self._here:
                    waiting.set()
                self._here = []
        return event


class ThreadTransport:
    """A `Transport` among threads of one process, without collectives of its own."""

    vendor: Vendor | None = None
    processes = False

    def __init__(self, job: Job, members: Sequence[int], rank: int, key: Space.Key = ()) -> None:
        """Messages as rank `rank` among these ranks of the job, in the message space `key`."""
        self.job = job
        self.size = len(members)
        self.rank = rank
        self.members = tuple(members)
        self.board: Board = job.boards[self.members[rank]]
        self._key = key
        self._space = job.space(key, self.size)
        self._subsets: dict[tuple[tuple[int, ...], str], Transport] = {}

    def isend(self, buffer: Array, dest: int, tag: int, synchronous: bool = False) -> Pending:
        """Copy into the receiver's buffer, or into one that is kept until it asks.

        `synchronous`: not kept, so the buffer may not change until the receiver has begun.
        """
        self.job.check()
        data = _raw(buffer)
        sender = Message(self, data) if synchronous or self.job.synchronous else None
        inbox = self._space.inboxes[dest]
        self.job.post(Parcel(inbox, (self.rank, tag), data, sender))
        return _BUFFERED if sender is None else sender

    def irecv(self, buffer: Array, source: int, tag: int) -> Pending:
        """Wait for the next message of this source and tag; it is copied in when it comes."""
        self.job.check()
        receiver = Message(self, _raw(buffer))
        self._space.inboxes[self.rank].ask((source, tag), receiver)
        return receiver

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.job.check()
        self.wait(self._space.arrive())

    def barrier_within(self, seconds: float) -> bool:
        """Wait for all ranks, but not longer than this."""
        self.job.check()
        return self._space.arrive().wait(seconds)

    def wait(self, event: threading.Event) -> None:
        """Wait for something that other ranks do."""
        self.job.wait(event, self.members[self.rank], self.members)

    def subset(self, ranks: Sequence[int], name: str) -> Transport:
        """Messages of their own among these ranks."""
        chosen = tuple(ranks)
        if len(chosen) == 1:
            return Alone()
        if (chosen, name) not in self._subsets:
            members = [self.members[rank] for rank in chosen]
            self._subsets[chosen, name] = ThreadTransport(
                self.job, members, chosen.index(self.rank), (*self._key, chosen, name)
            )
        return self._subsets[chosen, name]

    def background(self, name: str) -> Transport:
        """Messages of their own among the same ranks; no wait here uses the CPU."""
        return self.subset(range(self.size), f"{name} in the background")

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the job pretends to have, among these ranks."""
        places = [self.job.nodes[member] for member in self.members]
        order = list(dict.fromkeys(place.index for place in places))
        local: dict[int, int] = defaultdict(int)
        found = []
        for place in places:
            size = sum(other.index == place.index for other in places)
            found.append(Node(place.host, order.index(place.index), local[place.index], size))
            local[place.index] += 1
        return tuple(found)

    def abort(self, code: int) -> None:
        """End the job: `hpcml.run` raises."""
        self.job.abort(self.members[self.rank], code)


def _settled(copied: Array) -> None:
    """The copy is made: a GPU's is only started, on a stream that is not the other rank's."""
    if on_device(copied):
        copied.device.synchronize()  # type: ignore[attr-defined]


def _raw(buffer: Array) -> Array:
    return buffer.reshape(-1).view(np.uint8)
