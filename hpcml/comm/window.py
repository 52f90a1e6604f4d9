"""Memory that the ranks of a node share, as collectives use it, and where its ranks meet."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from hpcml.backend import is_half
from hpcml.comm.algorithms import find
from hpcml.comm.board import Group
from hpcml.comm.link import Link
from hpcml.comm.meeting import Meeting
from hpcml.comm.shared import share
from hpcml.comm.transport import Array
from hpcml.kernels import compiled
from hpcml.memory import owner_of

_PAGE = mmap.PAGESIZE
CHUNK = 1 << 18
"""Bytes of ordinary memory that go through shared memory at once: they stay in the cache."""


class Window:
    """Memory of one size on each rank of a group on one node."""

    def __init__(self, link: Link, region: mmap.mmap, stride: int, number: int) -> None:
        """`stride` bytes of each rank; `number` counts the windows that the group has made."""
        self.region, self.number = region, number
        self.offset = link.rank * stride
        self.members = link.members
        self.plans: dict[Any, Any] = {}
        """How calls on this memory are done; see `hpcml.comm.inplace`."""
        whole = np.frombuffer(region, np.uint8)
        self._bytes = whole.reshape(link.size, stride)
        self.start = address(whole) + self.offset

    def rows(self, dtype: np.dtype[Any]) -> Array:
        """The memory of all ranks as a matrix, a row each; 16-bit floats as uint16."""
        return self._bytes.view(np.uint16 if is_half(dtype) else dtype)


class Scratch:
    """Shared memory through which ordinary memory of ranks goes, a chunk at a time.

    Its two halves take turns. A rank that writes to a half has met the others since they read from
    it: they have come to the meeting of the other half. So one meeting a turn is enough.
    """

    def __init__(self, window: Window, meeting: Meeting) -> None:
        """A window of two chunks, and where its ranks meet."""
        self._window, self._half = window, 0
        self._meeting = meeting
        self.meet = meeting.meet
        self._floats: dict[str, tuple[Any, Array, int]] = {}

    def rows(self, dtype: np.dtype[Any]) -> Array:
        """The memory of all ranks, a row each; 16-bit floats as uint16."""
        return self._window.rows(dtype)

    def prepare(self, dtype: np.dtype[Any]) -> None:
        """Load what calls on this type need."""
        if dtype.char in "fd":
            self._of(dtype)

    def room(self, itemsize: int) -> int:
        """Elements of this size that a turn has room for."""
        return CHUNK // itemsize

    def turn(self, itemsize: int) -> int:
        """The column at which the half whose turn it is begins."""
        self._half ^= 1
        return self._half * self.room(itemsize)

    def sum(self, x: Array, out: Array, whole: bool, onto: bool) -> None:
        """Floats of all ranks by `sum_by_way` of the kernels."""
        kernels, rows, room = self._of(out.dtype)
        turns = -(-out.size // room)
        meetings, half = turns if whole else 2 * turns, self._half ^ 1
        self._meeting.by_way(kernels.sum_by_way, meetings, rows, half, room, x, out, whole, onto)
        self._half = (self._half + turns) & 1

    def scatter(self, edges: Array, longest: int, x: Array, out: Array, onto: bool) -> None:
        """Blocks of floats of all ranks by `scatter_by_way` of the kernels."""
        kernels, rows, room = self._of(out.dtype)
        turns = -(-longest // (room // rows.shape[0]))
        self._meeting.by_way(
            kernels.scatter_by_way, turns, rows, self._half ^ 1, room, edges, x, out, onto
        )
        self._half = (self._half + turns) & 1

    def gather(self, edges: Array, longest: int, x: Array, out: Array) -> None:
        """Arrays of floats of all ranks by `gather_by_way` of the kernels."""
        kernels, rows, room = self._of(out.dtype)
        turns = -(-longest // room)
        self._meeting.by_way(
            kernels.gather_by_way, turns, rows, self._half ^ 1, room, edges, x, out
        )
        self._half = (self._half + turns) & 1

    def _of(self, dtype: np.dtype[Any]) -> tuple[Any, Array, int]:
        found = self._floats.get(dtype.char)
        if found is None:
            staged = compiled(dtype.name).staged
            found = self._floats[dtype.char] = (staged, self.rows(dtype), self.room(dtype.itemsize))
        return found


class Windows:
    """The windows of a group of ranks, and where they meet in one stream of calls."""

    def __init__(self, link: Link, group: Group) -> None:
        """Windows of the ranks of `link`, which may be on several nodes.

        `group`: the same ranks as reports name them.
        """
        self.link = link
        # Its calls are counted apart from those of the axis.
        self.group = Group(f"{group.name}, shared memory", group.members)
        mine = [rank for rank, node in enumerate(link.nodes) if node == link.node]
        self.local = link if len(mine) == link.size else link.part(mine)
        self.members = self.local.members
        nodes = len(set(link.nodes))
        self.spread = nodes > 1
        self._meeting: Meeting | None = None
        self._scratch: Scratch | None = None
        self._made = 0
        self._asked = False
        # Nobody to share with, or nothing that is not shared anyway.
        self._alone = nodes == link.size or not link.transport.processes

    @property
    def meeting(self) -> Meeting | None:
        """Where the ranks meet, or None without room for it. The first use is collective."""
        if self._meeting is None and not self._alone:
            self._enter(_PAGE)
            try:
                region = share(self.local, _PAGE)
                self._alone = not _all(self.link, region is not None)
            finally:
                self.link.transport.board.leave()
            if region is not None and not self._alone:
                self._meeting = Meeting(self.local, region)
            self.link.take_counts()  # setting it up is no part of the first call
        return self._meeting

    def scratch(self) -> Scratch | None:
        """Shared memory for calls on ordinary memory, or None. The first use is collective."""
        if not self._asked and not (self._alone or self.spread):
            self._asked = True
            meeting = self.meeting
            window = self.make(2 * CHUNK) if meeting is not None else None
            if meeting is not None and window is not None:
                self._scratch = Scratch(window, meeting)
            self.link.take_counts()
        return self._scratch

    def make(self, nbytes: int) -> Window | None:
        """A window of at least so many bytes for each rank, or None. Collective over the link.

        Raises `ValueError` on all ranks if they ask for different sizes.
        """
        self._enter(nbytes)
        try:
            return self._make(nbytes)
        finally:
            self.link.transport.board.leave()

    def _enter(self, nbytes: int) -> None:
        """Ranks wait for each other here too; never within a call that is on the board already."""
        board = self.link.transport.board
        board.enter("sharing of memory", self.group, self._made + 1, nbytes, "uint8")

    def _make(self, nbytes: int) -> Window | None:
        sizes: Array = np.empty(self.link.size, np.int64)
        mine = np.array([nbytes])
        find("allgather", "ring").run(self.link, mine, sizes, (1,) * self.link.size)
        if (sizes != nbytes).any():
            asked = ", ".join(map(str, sizes.tolist()))
            raise ValueError(f"Axis.empty is for the same memory on all ranks, not {asked} bytes")
        if self._alone:
            return None
        stride = -(-nbytes // _PAGE) * _PAGE
        region = share(self.local, stride)
        if not _all(self.link, region is not None):  # no node goes by messages alone
            return None
        assert region is not None
        self._made += 1
        return Window(self.local, region, stride, self._made)

    def window_of(self, given: Any) -> Window | None:
        """The memory shared by these ranks in which an argument lies, if it does."""
        window = owner_of(given) if isinstance(given, np.ndarray) else None
        found = isinstance(window, Window) and window.members == self.members
        return window if found else None


def address(x: Array) -> int:
    """Where an array begins in the memory of this process."""
    start: int = x.__array_interface__["data"][0]
    return start


def _all(link: Link, mine: bool) -> bool:
    """Whether it is so on all ranks."""
    flags: Array = np.empty(link.size, np.uint8)
    find("allgather", "ring").run(link, np.array([mine], np.uint8), flags, (1,) * link.size)
    return bool(flags.all())
