"""The memory in which the ranks of a node note where they are, and how to read it.

A file that all ranks of the node have mapped, with a fixed place for each rank and, within it, one
for each thread that communicates. Ranks write without locks, so a reader may see a record that is
half new: it gets a wrong word at worst. Standard library only, since the sentinel starts with
nothing else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from typing import NamedTuple

THREADS = 8
"""Threads of a rank that have a place of their own; further ones share them."""

_MAGIC = b"hpcml-1\0"
_HEADER = struct.Struct("<8sIIdQ")  # magic, ranks, told, deadline
_RANK = struct.Struct("<B3xIIII4xd64s256s")  # state, pid, rank, nodes, pipe, since, host, line
_CALL = struct.Struct("<B7xdQQ128s320s")  # state, since, sequence, count, call, place
_LEFT = struct.Struct("<B7xd")  # how a call's record begins
_TOLD, _DEADLINE = 12, 16
_LINE = 96
_SIZE = _RANK.size + THREADS * _CALL.size

RUNNING, LEFT, FAILED = 0, 1, 2
"""States of a rank: at work, at the end of its program, ended by an error that it tells itself."""
INSIDE, OUTSIDE = 1, 2
"""States of a call: on its way, come back."""


class Call(NamedTuple):
    """A call, on its way or the last one of its thread."""

    inside: bool
    since: float
    """When it began or came back, on the clock of `time.monotonic`."""
    sequence: int
    """Among the collectives of its axis; 0 for a message."""
    elements: int
    operation: str
    axis: str
    members: str
    """The ranks that take part, as `spell` writes them."""
    dtype: str
    place: str
    """File and line."""

    def __str__(self) -> str:
        if self.sequence:
            call = f"{self.operation} #{self.sequence} on {self.axis} (ranks {self.members})"
        else:
            call = f"{self.operation} with rank {self.members} on {self.axis}"
        what = f", {self.elements} {self.dtype}" if self.elements else ""
        return f"{call}{what}, at {self.place}"


class Position(NamedTuple):
    """What is known of a rank."""

    rank: int
    pid: int
    host: str
    nodes: int
    """Nodes of the job."""
    pipe: int
    """Descriptor in that process of the end to read of a pipe that it never writes to."""
    state: int
    since: float
    """When it joined."""
    line: str
    """Where it was computing when it was last looked at; empty if that is too long ago."""
    calls: tuple[Call, ...]
    """The last call of each of its threads."""

    @property
    def inside(self) -> list[Call]:
        """The calls that it is in, the longest first."""
        return sorted((call for call in self.calls if call.inside), key=lambda call: call.since)

    @property
    def last(self) -> Call | None:
        """The call that it has come back from last."""
        return max(self.calls, key=lambda call: call.since, default=None)


class Sheet:
    """The memory, and the right to tell how the job ends."""

    def __init__(self, memory: mmap.mmap | bytearray, file: int | None = None) -> None:
        """Memory made by `size_for`, and the descriptor of its file if other processes have it."""
        self.memory = memory
        self.file = file
        """The file that other processes have mapped too, if any."""
        self._lock = threading.Lock()

    @classmethod
    def private(cls, ranks: int) -> Sheet:
        """Memory of this process alone."""
        sheet = cls(bytearray(size_for(ranks)))
        sheet.begin(ranks)
        return sheet

    @classmethod
    def of_file(cls, file: int) -> Sheet:
        """The memory in this open file."""
        return cls(mmap.mmap(file, 0), file)

    def begin(self, ranks: int) -> None:
        """Write the header; once, by whoever made the memory."""
        _HEADER.pack_into(self.memory, 0, _MAGIC, ranks, 0, 0.0, 0)

    def join(self, index: int, rank: int, host: str, nodes: int, pipe: int, now: float) -> None:
        """Write a rank's own record."""
        me = (RUNNING, os.getpid(), rank, nodes, pipe, now, host.encode()[:63], b"")
        _RANK.pack_into(self.memory, place_of(index), *me)

    def mark(self, index: int, state: int) -> None:
        """Note that a rank ends."""
        self.memory[place_of(index)] = state

    def note_line(self, index: int, line: bytes) -> None:
        """Note where a rank is computing."""
        struct.pack_into("<256s", self.memory, place_of(index) + _LINE, line[:255])

    def take(self) -> bool:
        """Whether the caller is the first on this node to ask: who is, tells how the job ends."""
        with self._lock:  # locks of files do not hold off the threads of a process
            if self.file is not None:
                fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                told = self.told()
                struct.pack_into("<I", self.memory, _TOLD, 1)
                return not told
            finally:
                if self.file is not None:
                    fcntl.flock(self.file, fcntl.LOCK_UN)

    def told(self) -> bool:
        """Whether somebody tells, or has told, how the job ends."""
        return bool(struct.unpack_from("<I", self.memory, _TOLD)[0])

    def end_by(self, deadline: float) -> None:
        """Have the sentinel kill the ranks of this node that are there after the deadline."""
        struct.pack_into("<d", self.memory, _DEADLINE, deadline)

    def deadline(self) -> float:
        """The deadline, 0 if there is none."""
        return float(struct.unpack_from("<d", self.memory, _DEADLINE)[0])

    def positions(self) -> list[Position]:
        """Where the ranks of the node are."""
        ranks = _HEADER.unpack_from(self.memory)[1]
        return [self.position(index) for index in range(ranks)]

    def position(self, index: int) -> Position:
        """Where one of them is."""
        at = place_of(index)
        state, pid, rank, nodes, pipe, since, host, line = _RANK.unpack_from(self.memory, at)
        calls = []
        for slot in range(THREADS):
            raw = _CALL.unpack_from(self.memory, call_of(index, slot))
            if raw[0]:
                calls.append(_call(*raw))
        return Position(
            rank, pid, _text(host), nodes, pipe, state, since, _text(line), tuple(calls)
        )


def size_for(ranks: int) -> int:
    """Bytes of the memory for so many ranks."""
    return _HEADER.size + ranks * _SIZE


def place_of(index: int) -> int:
    """Where the record of the node's rank `index` begins."""
    return _HEADER.size + index * _SIZE


def call_of(index: int, slot: int) -> int:
    """Where the record of one of its threads begins."""
    return place_of(index) + _RANK.size + slot * _CALL.size


pack_call = _CALL.pack_into
"""(memory, place, INSIDE, since, sequence, count, call, place): a thread enters a call."""
pack_left = _LEFT.pack_into
"""(memory, place, OUTSIDE, since): it has come back."""


def spell(ranks: tuple[int, ...]) -> str:
    """Ranks in few characters: 0-3, 8, 10, or 0-6:2 for each second one."""
    runs: list[list[int]] = []  # first, last, step
    for rank in ranks:
        if runs and rank > runs[-1][1] and runs[-1][2] in (0, rank - runs[-1][1]):
            runs[-1][1:] = rank, rank - runs[-1][1]
        else:
            runs.append([rank, rank, 0])
    return ", ".join(_run(*run) for run in runs)


def _run(first: int, last: int, step: int) -> str:
    if first == last:
        return str(first)
    if last - first == step > 1:
        return f"{first}, {last}"
    return f"{first}-{last}" if step == 1 else f"{first}-{last}:{step}"


def ranks_of(text: str) -> list[int]:
    """The ranks that `spell` has written; those that can be read, if it was cut off."""
    ranks: list[int] = []
    for part in text.split(","):
        bounds, _, step = part.strip().partition(":")
        first, _, last = bounds.partition("-")
        if first.isdecimal():
            stop = int(last) if last.isdecimal() else int(first)
            ranks += range(int(first), stop + 1, int(step) if step.isdecimal() else 1)
    return ranks


def call_text(operation: str, axis: str, members: tuple[int, ...], dtype: str) -> bytes:
    """The part of a call's record that its callers keep."""
    return "\t".join((operation, dtype, axis, spell(members))).encode()[:127]


def _call(state: int, since: float, sequence: int, count: int, text: bytes, place: bytes) -> Call:
    words = [*_text(text).split("\t"), "", "", "", ""]
    return Call(
        state == INSIDE, since, sequence, count, words[0], words[2], words[3], words[1],
        _text(place),
    )  # fmt: skip


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")
