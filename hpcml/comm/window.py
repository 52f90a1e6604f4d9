"""Collectives where the data lies: in memory that the ranks of a node share.

Each rank sums its slice straight from the memory of all and stores the sum into the memory of all,
in one pass.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hpcml.backend import is_half
from hpcml.comm.algorithms import Situation, find, span
from hpcml.comm.algorithms.choosing import choose
from hpcml.comm.board import Group
from hpcml.comm.buffers import wire
from hpcml.comm.fold import adds_floats, fold_of
from hpcml.comm.link import Link
from hpcml.comm.meeting import NUMBERS, Meeting, Place
from hpcml.comm.reduction import Reduction
from hpcml.comm.shared import share
from hpcml.comm.transport import Array
from hpcml.memory import owner_of

_PAGE = mmap.PAGESIZE
_LINE = 64
"""Elements to whole multiples of which slices are cut: no two ranks write to one cache line."""
CHUNK = 1 << 18
"""Bytes of ordinary memory that go through shared memory at once: they stay in the cache."""
_PLANS = 256
"""Calls that a window remembers."""


@dataclass(slots=True)
class Plan:
    """What a rank does in one call on one place of a window, worked out beforehand."""

    place: Place
    work: Callable[[Array], None]
    """What is done between the two meetings, given the result's array."""
    sent: int
    """Bytes written into memory of others, or fetched by them."""
    copies: bool = False
    """The input is copied to the result first."""
    whole: Callable[[Array, Array], None] | None = None
    """Where one compiled call does it all, meetings and copying included: given input, result."""


class Window:
    """Memory of one size on each rank of a group on one node."""

    def __init__(self, link: Link, region: mmap.mmap, stride: int, number: int) -> None:
        """`stride` bytes of each rank; `number` counts the windows that the group has made."""
        self.region, self.number = region, number
        self.offset = link.rank * stride
        self.members = link.members
        self.plans: dict[Any, Plan] = {}
        whole = np.frombuffer(region, np.uint8)
        self._bytes = whole.reshape(link.size, stride)
        self.start = _address(whole) + self.offset

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
        self.meet = meeting.meet
        self.sum = meeting.sum_by_way

    def rows(self, dtype: np.dtype[Any]) -> Array:
        """The memory of all ranks, a row each; 16-bit floats as uint16."""
        return self._window.rows(dtype)

    def room(self, itemsize: int) -> int:
        """Elements of this size that a turn has room for."""
        return CHUNK // itemsize

    def turn(self, itemsize: int) -> int:
        """The column at which the half whose turn it is begins."""
        self._half ^= 1
        return self._half * self.room(itemsize)


class Windows:
    """Collectives of one stream in the windows of a group of ranks."""

    def __init__(self, link: Link, group: Group, ordered: bool) -> None:
        """The collectives of the ranks of `link`, which may be on several nodes.

        `group`: the same ranks as reports name them. `ordered`: combine in the order of all ranks,
        whatever their nodes.
        """
        self.link, self.ordered = link, ordered
        # Its calls are counted apart from those of the axis.
        self.group = Group(f"{group.name}, shared memory", group.members)
        mine = [rank for rank, node in enumerate(link.nodes) if node == link.node]
        self.local = link if len(mine) == link.size else link.part(mine)
        self.members = self.local.members
        # Between nodes the i-th ranks of all nodes join their slices, of which every node has as
        # many as the smallest node has ranks.
        by_node = [[r for r, n in enumerate(link.nodes) if n == node] for node in set(link.nodes)]
        self.slices = min(map(len, by_node))
        self.peers: Link | None = None
        if len(by_node) > 1 and self.local.rank < self.slices:
            self.peers = link.part(sorted(ranks[self.local.rank] for ranks in by_node))
        self.spread = len(by_node) > 1
        self._meeting: Meeting | None = None
        self._scratch: Scratch | None = None
        self._made = 0
        self._asked = False
        # Nobody to share with, or nothing that is not shared anyway.
        self._alone = len(by_node) == link.size or not link.transport.processes

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

    def holds(self, given: Any) -> bool:
        """Whether an argument lies in memory that these ranks share."""
        window = owner_of(given) if isinstance(given, np.ndarray) else None
        return isinstance(window, Window) and window.members == self.members

    def plan(self, operation: str, x: Array, out: Any = None, *rest: Any) -> Plan | None:
        """How to do a call with these arguments of an algorithm, if they lie where that needs them.

        An all-reduce its result (and its input, if it adds to the result), a reduce-scatter its
        input, an all-gather its result, a broadcast its buffer.
        """
        lies = x if operation in ("reduce_scatter", "broadcast") else out
        window = owner_of(lies) if isinstance(lies, np.ndarray) else None
        if not isinstance(window, Window) or window.members != self.members:
            return None
        if self.meeting is None:  # asked for now: later the call is on the board
            return None
        column, misplaced = divmod(_address(lies) - window.start, lies.itemsize)
        if misplaced:
            return None
        arguments = (out,) if operation == "broadcast" else rest
        # A plan is one stream's own, like the place where its ranks meet.
        key = (self, operation, column, lies.size, lies.dtype, arguments, x is out)
        plan = window.plans.get(key)
        if plan is None:
            make = getattr(self, f"_{operation}", None)
            plan = make(window, column, x, out, *rest) if make else None
            if plan is not None and not (operation == "allreduce" and rest[0].onto):
                if len(window.plans) >= _PLANS:
                    window.plans.clear()
                window.plans[key] = plan
        return plan

    def run(self, plan: Plan, x: Array, out: Any = None, *rest: Any) -> None:
        """Do a call as planned; the arguments are those of an algorithm."""
        self.link.sent += plan.sent
        if plan.whole is not None:
            plan.whole(x, out)
            return
        if plan.copies:
            out[...] = x
        meeting = self._where()
        meeting.begin(plan.place)
        plan.work(out)
        meeting.meet()

    def _where(self) -> Meeting:
        assert self._meeting is not None, "a plan without a meeting"
        return self._meeting

    def _allreduce(
        self, window: Window, column: int, x: Array, out: Array, reduction: Reduction
    ) -> Plan | None:
        """In the order of the ranks of a node, then of the nodes."""
        # Between the nodes partial results meet: not in the order of the ranks, rounded anew, and
        # with what the result held counted on every node.
        if self.spread and (self.ordered or reduction.onto or is_half(out.dtype)):
            return None
        rank, source, first = self.local.rank, window, column
        if reduction.onto:
            source = owner_of(x)
            if not isinstance(source, Window) or source.members != self.members:
                return None
            first, misplaced = divmod(_address(x) - source.start, x.itemsize)
            if misplaced:
                return None
        own = self._slice(rank, out.size)
        rows, results = source.rows(out.dtype), window.rows(out.dtype)
        bounds = (rank, first + own.start, first + own.stop, first - column)
        fold = fold_of(reduction, out.dtype)
        work: Callable[[Array], None] = lambda out: fold(rows, results, *bounds)  # noqa: E731
        if self.spread:
            mine = results[rank : rank + 1]
            work = partial(
                self._over_nodes, lambda: fold(rows, mine, 0, *bounds[1:]), results, column,
                reduction,
            )  # fmt: skip
        copies = x is not out and not reduction.onto
        place = source.number, first, out.size, NUMBERS["allreduce", reduction.op, out.dtype.name]
        sent = (self.local.size - 1) * (own.stop - own.start) * out.itemsize
        if not adds_floats(reduction, out.dtype) or self.spread:
            return Plan(place, work, sent, copies)
        add = self._where().sum

        def whole(x: Array, out: Array) -> None:
            if copies:
                out[...] = x
            add(place, rows, results, *bounds, reduction.onto)

        return Plan(place, work, sent, copies, whole)

    def _over_nodes(
        self,
        fold: Callable[[], None],
        results: Array,
        column: int,
        reduction: Reduction,
        out: Array,
    ) -> None:
        """Join the slices of this node with those of the others, then fetch them all."""
        rank = self.local.rank
        fold()
        if self.peers is not None:
            part = out[self._slice(rank, out.size)]
            native = not is_half(part.dtype)
            situation = Situation(self.peers.nodes, native, ordered=not native)
            chosen = choose("allreduce", part.nbytes, situation, self.peers.table)
            chosen.run(self.peers, part, part, reduction)
        self._where().meet()
        for other in range(self.slices):
            if other != rank:
                theirs = self._slice(other, out.size)
                columns = slice(column + theirs.start, column + theirs.stop)
                results[rank, columns] = results[other, columns]

    def _reduce_scatter(
        self, window: Window, column: int, x: Array, out: Array, counts: Sequence[int],
        reduction: Reduction,
    ) -> Plan | None:  # fmt: skip
        if self.spread:
            return None
        own = span(counts, self.local.rank)
        rows, part = window.rows(x.dtype), (column + own.start, column + own.stop)
        fold, bounds = fold_of(reduction, x.dtype), (0, *part, part[0])
        place = window.number, column, x.size, NUMBERS["reduce_scatter", reduction.op, x.dtype.name]
        sent = (own.stop - own.start) * x.itemsize * (self.local.size - 1)
        plan = Plan(place, lambda out: fold(rows, wire(out)[None], *bounds), sent)
        if adds_floats(reduction, x.dtype):
            add = self._where().sum
            plan.whole = lambda x, out: add(place, rows, out[None], *bounds, reduction.onto)
        return plan

    def _allgather(
        self, window: Window, column: int, x: Array, out: Array, counts: Sequence[int]
    ) -> Plan | None:
        if self.spread:
            return None
        rows, store = window.rows(np.dtype(np.uint8)), self._where().store
        place = window.number, column, out.size, NUMBERS["allgather", "", out.dtype.name]
        first = (column + span(counts, self.local.rank).start) * out.itemsize
        home = window.start + first

        def whole(x: Array, out: Array) -> None:
            store(place, rows, first, x.view(np.uint8), _address(x) == home)

        return Plan(place, _nothing, x.nbytes * (self.local.size - 1), whole=whole)

    def _broadcast(self, window: Window, column: int, x: Array, root: int) -> Plan | None:
        if self.spread:
            return None
        rank, rows, columns = self.local.rank, window.rows(x.dtype), slice(column, column + x.size)
        mine, other = rows[rank, columns], rows[root, columns]

        def work(out: Any) -> None:
            if rank != root:
                np.copyto(mine, other)

        sent = x.nbytes * (self.local.size - 1) if rank == root else 0
        call = NUMBERS["broadcast", "", x.dtype.name]
        return Plan((window.number, column, x.size, call), work, sent)

    def _slice(self, rank: int, count: int) -> slice:
        """The elements that a rank of the node combines; whole cache lines, none past `slices`."""
        if rank >= self.slices:
            return slice(count, count)
        step = -(-count // (self.slices * _LINE)) * _LINE
        return slice(min(rank * step, count), min((rank + 1) * step, count))


def _nothing(out: Array) -> None:
    """What is left to do where one compiled call does it all."""


def _address(x: Array) -> int:
    start: int = x.__array_interface__["data"][0]
    return start


def _all(link: Link, mine: bool) -> bool:
    """Whether it is so on all ranks."""
    flags: Array = np.empty(link.size, np.uint8)
    find("allgather", "ring").run(link, np.array([mine], np.uint8), flags, (1,) * link.size)
    return bool(flags.all())
