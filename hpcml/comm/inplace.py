"""Collectives where the data lies: in memory that the ranks of a node share.

Each rank sums its slice straight from the memory of all and stores the sum into the memory of all,
in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hpcml.backend import is_half
from hpcml.comm.algorithms import Situation, span
from hpcml.comm.algorithms.choosing import choose
from hpcml.comm.board import Group
from hpcml.comm.buffers import wire
from hpcml.comm.fold import fold_of
from hpcml.comm.link import Link
from hpcml.comm.meeting import NUMBERS, Meeting, Place
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array
from hpcml.comm.window import Window, Windows, address

_LINE = 64
"""Elements to whole multiples of which slices are cut: no two ranks write to one cache line."""
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


class InPlace(Windows):
    """Collectives of one stream in the windows of a group of ranks.

    An all-reduce takes its result there (and its input, if it adds to the result), a reduce-scatter
    its input, an all-gather its result, a broadcast its buffer; what else a call is given may be
    anywhere.
    """

    def __init__(self, link: Link, group: Group, ordered: bool) -> None:
        """As `Windows`. `ordered`: combine in the order of all ranks, whatever their nodes."""
        super().__init__(link, group)
        self.ordered = ordered
        # Between nodes the i-th ranks of all nodes join their slices, of which every node has as
        # many as the smallest node has ranks.
        by_node = [[r for r, n in enumerate(link.nodes) if n == node] for node in set(link.nodes)]
        self.slices = min(map(len, by_node))
        self.peers: Link | None = None
        if self.spread and self.local.rank < self.slices:
            self.peers = link.part(sorted(ranks[self.local.rank] for ranks in by_node))

    def plan(self, operation: str, x: Array, out: Any = None, *rest: Any) -> Plan | None:
        """How to do a call with these arguments of an algorithm, if they lie as that needs it."""
        lies = x if operation in ("reduce_scatter", "broadcast") else out
        window = self.window_of(lies)
        if window is None or self.meeting is None:  # asked for now: later the call is on the board
            return None
        column = _column(window, lies)
        if column is None:
            return None
        arguments = (out,) if operation == "broadcast" else rest
        # A plan is one stream's own, like the place where its ranks meet.
        key = (self, operation, column, lies.size, lies.dtype, arguments, x is out)
        plan: Plan | None = window.plans.get(key)
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
            lies = self.window_of(x)
            begins = None if lies is None else _column(lies, x)
            if lies is None or begins is None:
                return None
            source, first = lies, begins
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
        add = None if self.spread else self._where().adder(reduction, out.dtype)
        if add is None:
            return Plan(place, work, sent, copies)

        def whole(x: Array, out: Array) -> None:
            if copies:
                out[...] = x
            add(place, rows, results, *bounds)

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
        add = self._where().adder(reduction, x.dtype)
        if add is not None:
            plan.whole = lambda x, out: add(place, rows, wire(out)[None], *bounds)
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
            store(place, rows, first, x.view(np.uint8), address(x) == home)

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


def _column(window: Window, x: Array) -> int | None:
    """The element of a rank's memory at which an array begins, if it begins with one."""
    column, misplaced = divmod(address(x) - window.start, x.itemsize)
    return None if misplaced else column


def _nothing(out: Array) -> None:
    """What is left to do where one compiled call does it all."""
