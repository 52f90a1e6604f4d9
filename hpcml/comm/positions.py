"""Where the ranks of this process are, when ranks are threads: their calls and their lines."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from hpcml.comm.ambient import here
from hpcml.comm.board import Board, Group
from hpcml.comm.sheet import spell

_WITHIN = (os.path.dirname(os.path.abspath(__file__)) + os.sep, threading.__file__)
"""Files that are no place of a program's: communication, and the waits it rests on."""


@dataclass(frozen=True)
class Call:
    """A call that waits for other ranks."""

    operation: str
    group: Group
    sequence: int
    count: int
    dtype: object
    place: str

    def __str__(self) -> str:
        number = f" #{self.sequence}" if self.sequence else ""
        members = self.group.members
        ranks = f"rank{'s' * (len(members) > 1)} {spell(members)}"
        what = f", {self.count} {self.dtype}" if self.count else ""
        return f"{self.operation}{number} on {self.group} ({ranks}){what}, at {self.place}"

    def meets(self, other: Call) -> bool:
        """Whether this is the same call of a collective as another rank's."""
        mine = (self.operation, self.group, self.sequence)
        return mine == (other.operation, other.group, other.sequence)


class ThreadBoard(Board):
    """The position of one rank: the calls that its threads are in, and how it ended."""

    def __init__(self, thread: threading.Thread, on_call: Callable[[str], None]) -> None:
        """`thread` is the rank; `on_call(operation)` is called by the thread that begins a call."""
        self.thread = thread
        self.end: str | None = None
        """How the rank ended, once it has."""
        self._on_call = on_call
        self._calls: dict[int, Call] = {}

    def enter(self, operation: str, group: Group, sequence: int, count: int, dtype: object) -> None:
        """Note a call, with the line of the program that makes it."""
        self._on_call(operation)
        place = here.place or place_of(sys._getframe(1))
        self._calls[threading.get_ident()] = Call(operation, group, sequence, count, dtype, place)

    def leave(self) -> None:
        """Note that the call has come back."""
        self._calls.pop(threading.get_ident(), None)

    def calls(self) -> list[Call]:
        """The calls that the rank is in now: one, or more if it has communication threads."""
        return list(self._calls.copy().values())

    def call(self) -> Call | None:
        """The call that this thread is in."""
        return self._calls.get(threading.get_ident())

    def __str__(self) -> str:
        ident = self.thread.ident or 0
        calls = [str(call) for call in self.calls()]
        if self.end is not None:
            calls.insert(0, self.end)
        elif ident not in self._calls:
            frame = sys._current_frames().get(ident)
            calls.insert(0, f"in no call, at {place_of(frame)}" if frame else "not started")
        return "; ".join(calls)


def place_of(frame: FrameType | None) -> str:
    """File and line of the innermost frame that is not communication, from this one outwards."""
    while frame is not None:
        if is_program(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "the end"


def is_program(frame: FrameType) -> bool:
    """Whether a frame is of a program, and not of communication itself."""
    return not frame.f_code.co_filename.startswith(_WITHIN)
