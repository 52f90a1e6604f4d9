"""Collectives where the data lies: in memory that the ranks of a node share.

Each rank sums its slice straight from the memory of all and stores the sum into the memory of all,
in one pass. Ranks meet at flags in shared memory, each on cache lines of its own; with its flag a
rank shows what it is about to do, so that calls which do not fit together are found out at no cost.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml import kernels, memory
from hpcml.comm.algorithms import Situation, find, span
from hpcml.comm.buffers import DTYPES, is_half, wire
from hpcml.comm.choice import choose
from hpcml.comm.link import Link
from hpcml.comm.reduction import OPS, Reduction
from hpcml.comm.shared import share
from hpcml.comm.transport import Array

_PAGE = mmap.PAGESIZE
_LINE = 64
"""Elements to whole multiples of which slices are cut: no two ranks write to one cache line."""
_SPINS, _YIELDS = 2000, 500
_NAP = 50e-6
"""Seconds between looks for a rank that is late."""

Call = tuple[str, str, str]
CALLS: list[Call] = [
    (operation, op, dtype)
    for operation in ("allreduce", "reduce_scatter")
    for op in OPS
    for dtype in DTYPES
] + [(operation, "", dtype) for operation in ("allgather", "broadcast") for dtype in DTYPES]
"""Every call there is: ranks compare the numbers of theirs."""
_SERVED = ("reduce_scatter", "allgather", "broadcast")
NUMBERS = {call: number for number, call in enumerate(CALLS)}


class Window:
    """Memory of one size on each rank of a group on one node."""

    def __init__(self, link: Link, region: mmap.mmap, stride: int, number: int) -> None:
        """`stride` bytes of each rank; `number` counts the windows that the group has made."""
        self.region, self.number = region, number
        self.offset = link.rank * stride
        self.members = link.members
        whole = np.frombuffer(region, np.uint8)
        self._bytes = whole.reshape(link.size, stride)
        self.start: int = whole.__array_interface__["data"][0] + self.offset
        self._rows: dict[str, Array] = {}

    def rows(self, dtype: np.dtype[Any]) -> Array:
        """The memory of all ranks as a matrix, a row each; 16-bit floats as uint16."""
        name = dtype.name
        found = self._rows.get(name)
        if found is None:
            wire = np.dtype(np.uint16) if name in ("float16", "bfloat16") else dtype
            found = self._rows[name] = self._bytes.view(wire)
        return found

    def column(self, x: Array) -> int:
        """The column of the matrix in which an array of this rank begins."""
        start: int = x.__array_interface__["data"][0]
        return (start - self.start) // x.itemsize


class Meeting:
    """The flags at which the ranks of one node meet in one stream of collectives.

    Made by all of them together, at the first call that finds its memory in a window.
    """

    def __init__(self, local: Link) -> None:
        """Flags of the ranks of `local`."""
        self.ranks = (local.size, local.rank)
        self.kernels = kernels.compiled("float32").shared
        region = share(local, _PAGE)
        assert region is not None, "no room for a page, after room for a window"
        self.flags: Array = np.frombuffer(region, np.int64)
        self.epoch = 0
        crowded = local.size > (os.cpu_count() or 1)
        self.patience = (0 if crowded else _SPINS, _YIELDS)

    def begin(self, what: Call, window: Window, column: int, count: int) -> None:
        """Meet at the start of a call; raises `ValueError` if the ranks do not call the same.

        They meet once more (`meet`) before the call is over.
        """
        self.epoch += 1
        call = (window.number, column, count, NUMBERS[what])
        while True:
            late = self.kernels.begin(self.flags, *self.ranks, self.epoch, *self.patience, *call)
            if late == -1:
                return
            if late == -2:
                raise ValueError(self._mismatch(window.members))
            time.sleep(_NAP)

    def meet(self) -> None:
        """Return when all ranks of the node have come here; what they wrote before is visible."""
        self.epoch += 1
        while self.kernels.meet(self.flags, *self.ranks, self.epoch, *self.patience) >= 0:
            time.sleep(_NAP)

    def _mismatch(self, members: tuple[int, ...]) -> str:
        rows = self.flags.reshape(-1, self.kernels.FLAGS)[: self.ranks[0], 1:5].tolist()
        shown = "; ".join(
            f"rank {member} calls {' '.join(CALLS[code])} of {count} elements from element "
            f"{column} of window {number} on"
            for member, (number, column, count, code) in zip(members, rows, strict=True)
        )
        return f"ranks must call the same operation on the same place of shared memory: {shown}"


class Windows:
    """Collectives of one stream in the windows of a group of ranks."""

    def __init__(self, link: Link, ordered: bool) -> None:
        """The collectives of the ranks of `link`, which may be on several nodes.

        `ordered`: combine in the order of all ranks, whatever their nodes.
        """
        self.link, self.ordered = link, ordered
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
        self._made = 0
        self._refused = len(by_node) == link.size  # nobody to share with

    @property
    def meeting(self) -> Meeting:
        """Where the ranks meet. The first use is collective."""
        if self._meeting is None:
            self._meeting = Meeting(self.local)
        return self._meeting

    def make(self, nbytes: int) -> Window | None:
        """A window of at least so many bytes for each rank, or None. Collective over the link.

        Raises `ValueError` on all ranks if they ask for different sizes.
        """
        sizes: Array = np.empty(self.link.size, np.int64)
        mine = np.array([nbytes])
        find("allgather", "ring").run(self.link, mine, sizes, (1,) * self.link.size)
        if (sizes != nbytes).any():
            asked = ", ".join(map(str, sizes.tolist()))
            raise ValueError(f"Axis.empty is for the same memory on all ranks, not {asked} bytes")
        if self._refused:
            return None
        stride = -(-nbytes // _PAGE) * _PAGE
        region = share(self.local, stride)
        if not _all(self.link, region is not None):  # no node goes by messages alone
            self._refused = True
            return None
        assert region is not None
        self._made += 1
        return Window(self.local, region, stride, self._made)

    def serve(self, operation: str, x: Array, out: Any = None, *rest: Any) -> bool:
        """Whether these arguments of an algorithm lie where the operation needs them.

        An all-reduce its result (and its input, if it adds to the result), a reduce-scatter its
        input, an all-gather its result, a broadcast its buffer.
        """
        if operation == "allreduce":
            onto = bool(rest) and rest[0].onto
            return self._holds(out) and not (onto and not self._holds(x)) and not (
                self.spread and self.ordered
            )
        if self.spread:
            return False
        return operation in _SERVED and self._holds(out if operation == "allgather" else x)

    def _holds(self, x: Array) -> bool:
        """Whether an array lies in memory that these ranks share."""
        owner = memory.owner_of(x)
        return isinstance(owner, Window) and owner.members == self.members

    def _window(self, x: Array) -> Window:
        window: Window = memory.owner_of(x)
        return window

    def allreduce(self, x: Array, out: Array, reduction: Reduction) -> None:
        """Combine in the order of the ranks of a node (then of the nodes) in a window's `out`."""
        if x is not out and not self._holds(x):
            out[...] = x
            x = out
        window, target = self._window(x), self._window(out)
        rows, meeting, rank = window.rows(x.dtype), self.meeting, self.local.rank
        first, place = window.column(x), target.column(out)
        own = self._slice(rank, x.size)
        meeting.begin(("allreduce", reduction.op, x.dtype.name), window, first, x.size)
        results = target.rows(x.dtype)
        part = slice(first + own.start, first + own.stop)
        if self.spread:
            _fold(rows, part, results[rank : rank + 1], 0, place + own.start, reduction, x.dtype)
        else:
            _fold(rows, part, results, rank, place + own.start, reduction, x.dtype)
        nbytes = (own.stop - own.start) * x.itemsize
        self.link.count_local((self.local.size - 1) * nbytes)
        if self.spread:
            if self.peers is not None:
                self._join(out[own], reduction)
            meeting.meet()
            for other in range(self.slices):
                part = self._slice(other, x.size)
                if other != rank:
                    columns = slice(place + part.start, place + part.stop)
                    results[rank, columns] = results[other, columns]
        meeting.meet()

    def reduce_scatter(
        self, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
    ) -> None:
        """Combine this rank's block of `x`, which lies in a window, into `out`."""
        window, meeting = self._window(x), self.meeting
        rows = window.rows(x.dtype)
        first = window.column(x)
        own = span(counts, self.local.rank)
        mine = slice(first + own.start, first + own.stop)
        meeting.begin(("reduce_scatter", reduction.op, x.dtype.name), window, first, x.size)
        _fold(rows, mine, wire(out).reshape(1, -1), 0, 0, reduction, x.dtype)
        self.link.count_local((own.stop - own.start) * x.itemsize * (self.local.size - 1))
        meeting.meet()

    def allgather(self, x: Array, out: Array, counts: Sequence[int]) -> None:
        """Fetch the blocks of all from their places in `out`, which lies in a window."""
        window, meeting, rank = self._window(out), self.meeting, self.local.rank
        rows = window.rows(out.dtype)
        first = window.column(out)
        home = out[span(counts, rank)]
        if not np.may_share_memory(home, x):
            home[...] = x
        meeting.begin(("allgather", "", out.dtype.name), window, first, out.size)
        for step in range(1, self.local.size):  # not all from the same rank at once
            other = (rank + step) % self.local.size
            part = span(counts, other)
            place = slice(first + part.start, first + part.stop)
            rows[rank, place] = rows[other, place]
        self.link.count_local(x.nbytes * (self.local.size - 1))
        meeting.meet()

    def broadcast(self, x: Array, root: int) -> None:
        """Fetch the root's buffer from its place in the window in which `x` lies."""
        window, meeting, rank = self._window(x), self.meeting, self.local.rank
        rows = window.rows(x.dtype)
        first = window.column(x)
        meeting.begin(("broadcast", "", x.dtype.name), window, first, x.size)
        if rank != root:
            rows[rank, first : first + x.size] = rows[root, first : first + x.size]
        else:
            self.link.count_local(x.nbytes * (self.local.size - 1))
        meeting.meet()

    def _slice(self, rank: int, count: int) -> slice:
        """The elements that a rank of the node combines; whole cache lines, none past `slices`."""
        if rank >= self.slices:
            return slice(count, count)
        step = -(-count // (self.slices * _LINE)) * _LINE
        return slice(min(rank * step, count), min((rank + 1) * step, count))

    def _join(self, part: Array, reduction: Reduction) -> None:
        """Combine a slice with the same slice of the other nodes."""
        assert self.peers is not None
        native = not is_half(part.dtype)
        ordered = reduction.stepwise or not native
        situation = Situation(self.peers.nodes, native, ordered)
        run = choose("allreduce", part.nbytes, situation).run
        run(self.peers, part, part, reduction)


def _all(link: Link, mine: bool) -> bool:
    """Whether it is so on all ranks."""
    flags: Array = np.empty(link.size, np.uint8)
    find("allgather", "ring").run(link, np.array([mine], np.uint8), flags, (1,) * link.size)
    return bool(flags.all())


def _fold(
    rows: Array, part: slice, results: Array, own: int, place: int, reduction: Reduction, dtype: Any
) -> None:
    """Combine columns `part` of all rows; the result goes to every row of `results` from `place`.

    `Reduction.onto` adds to what row `own` of `results` holds.
    """
    if part.start == part.stop:
        return
    bounds = (own, part.start, part.stop, part.start - place, reduction.onto)
    several = rows.shape[0] > 1 and reduction.op == "sum"
    if several and dtype.name in ("float32", "float64"):
        kernels.compiled(dtype.name).shared.sum_rows(rows, results, *bounds)
    elif several and is_half(dtype):
        brain = dtype.name == "bfloat16"
        add = kernels.compiled("float32").shared.sum_half_rows
        add(rows, results, *bounds, brain, reduction.stepwise)
    else:
        target = slice(place, place + part.stop - part.start)
        combined = results[own, target].view(dtype).copy()
        reduction.fold([row[part].view(dtype) for row in rows], combined)
        results[:, target] = combined.view(rows.dtype)
