"""Sums over the ranks of an axis that each adds to when it comes to it, waiting for no other.

Within a node one-sided: the sums lie in memory that all ranks share, and whoever has something to
add does so there, whatever the others do, as `MPI_Accumulate` to a window would. Between nodes no
library that installs from a wheel moves data into a window while its owner computes: it waits for
that rank's next call. There a sum is an all-reduce in the background.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import backend, kernels, memory
from hpcml.backend import Array
from hpcml.comm.axis import Axis
from hpcml.comm.board import Group
from hpcml.comm.meeting import NAP, patience
from hpcml.comm.request import Request
from hpcml.comm.timeline import Call, clock
from hpcml.comm.window import Window

_LINE = 16
"""Words that are fetched together: two cache lines, because CPUs fetch them in pairs."""


class RunningSums(ABC):
    """Sums of flat arrays, one after the other, and with each a number from every rank.

    All ranks add to the same sums in the same order, each when it likes. `len` of it is how many
    this rank has added to and not dropped: never more than there is room for.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.added = 0
        """Sums that this rank has added to."""
        self.dropped = 0

    def __len__(self) -> int:
        return self.added - self.dropped

    def add(self, x: Array, number: float = 0.0) -> None:
        """Add to the next sum. Returns as soon as `x` may change."""
        if len(self) == self.room:
            raise ValueError(f"there is room for {self.room} sums: drop one first")
        self._add(x, number)
        self.added += 1

    def drop(self) -> None:
        """The first sum is not needed any more."""
        self._drop()
        self.dropped += 1

    @abstractmethod
    def ready(self) -> bool:
        """Whether all ranks have added to the first sum, so that `first` returns at once."""

    @abstractmethod
    def first(self) -> tuple[Array, Array]:
        """The first sum that was not dropped, once all have added to it, and the ranks' numbers.

        The arrays are to be read, until `drop`.
        """

    @abstractmethod
    def _add(self, x: Array, number: float) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...


def running_sums(axis: Axis, size: int, dtype: Any, room: int) -> RunningSums:
    """Sums of `size` float32 or float64 elements, `room` of them at a time. Collective."""
    shared = OnNode.of(axis, size, np.dtype(dtype), room)
    return ByMessages(axis, size, dtype, room) if shared is None else shared


class ByMessages(RunningSums):
    """Sums that are all-reduces in the background, each of which begins when all have come."""

    def __init__(self, axis: Axis, size: int, dtype: Any, room: int) -> None:
        """As `running_sums`, for any ranks."""
        super().__init__(room)
        self._axis = axis
        self._slots = [axis.empty(size, dtype) for _ in range(room)]
        self._under_way: deque[tuple[Request, Request]] = deque()

    def ready(self) -> bool:
        """As the base class says."""
        return all(request.test() for request in self._under_way[0]) if len(self) else False

    def first(self) -> tuple[Array, Array]:
        """As the base class says."""
        total, numbers = self._under_way[0]
        return total.wait(), numbers.wait()

    def _add(self, x: Array, number: float) -> None:
        slot = self._slots[self.added % self.room]
        backend.put(x, slot)
        numbers = np.zeros(self._axis.size)
        numbers[self._axis.rank] = number
        total = self._axis.iallreduce(slot, out=slot)
        self._under_way.append((total, self._axis.iallreduce(numbers, out=numbers)))

    def _drop(self) -> None:
        self._under_way.popleft()


class OnNode(RunningSums):
    """Sums in memory that the ranks share, `room` places in turn.

    A place is free for the next sum when all ranks have dropped the last one there.
    """

    def __init__(self, axis: Axis, own: Array, size: int, dtype: np.dtype[Any], room: int) -> None:
        """`own`: this rank's part of so many bytes as `_layout` says, from `Axis.empty`."""
        super().__init__(room)
        self._axis, self._own = axis, own
        window = memory.owner_of(own)
        # The calls of each are counted apart.
        name = f"{axis.name}, sums in window {window.number}"
        self._group = Group(name, axis.transport.members)
        self._kernels = kernels.compiled(dtype.name).running
        self._patience = patience(axis.size)
        width, stride = _layout(axis.size, size, dtype)
        whole = np.frombuffer(window.region, np.uint8)
        head, sums = whole[: room * width * 8], whole[room * width * 8 :][: room * stride]
        words = head.view(np.int64).reshape(room, width)
        self._have_added, self._have_dropped = words[:, :_LINE], words[:, _LINE : 2 * _LINE]
        self._numbers = words[:, 2 * _LINE : 2 * _LINE + axis.size].view(np.float64)
        self._blocks = words[:, -self._kernels.blocks(size) :]
        self._sums = sums.view(dtype).reshape(room, -1)[:, :size]

    @classmethod
    def of(cls, axis: Axis, size: int, dtype: np.dtype[Any], room: int) -> OnNode | None:
        """Such sums, where all ranks of the axis share memory. Collective."""
        width, stride = _layout(axis.size, size, dtype)
        own = axis.empty(-(-room * (width * 8 + stride) // axis.size), np.uint8)
        window = memory.owner_of(own)
        shared = isinstance(window, Window) and window.members == axis.transport.members
        return cls(axis, own, size, dtype, room) if shared else None

    def ready(self) -> bool:
        """As the base class says."""
        return len(self) > 0 and self._all(self._have_added, self.dropped, look_once=True)

    def first(self) -> tuple[Array, Array]:
        """As the base class says."""
        self._until(lambda: self._all(self._have_added, self.dropped), self.dropped)
        place = self.dropped % self.room
        return self._sums[place], self._numbers[place]

    def _add(self, x: Array, number: float) -> None:
        place = self.added % self.room
        before = self.added - self.room
        if before >= 0:
            self._until(lambda: self._all(self._have_dropped, before), self.added)
        self._numbers[place, self._axis.rank] = number
        blocks, ranks = self._blocks[place], (self._axis.size, self._axis.rank)
        fixed = (*self._patience, backend.to_kind(x, "cpu"), self._sums[place])
        done = 0

        def add() -> bool:
            nonlocal done
            done = self._kernels.add_to(blocks, *ranks, done, *fixed)
            return bool(done == blocks.size)

        self._until(add, self.added)
        self._kernels.count(self._have_added[place], 0)
        sent = -(-x.nbytes * (self._axis.size - 1) // self._axis.size)
        self._axis.ledger.record(self._axis.name, "accumulate", x.nbytes, sent)

    def _drop(self) -> None:
        self._kernels.count(self._have_dropped[self.dropped % self.room], 0)

    def _all(self, words: Array, number: int, look_once: bool = False) -> bool:
        """Whether all ranks have done with sum `number` what the words count."""
        turn, place = divmod(number, self.room)
        times, looks = self._axis.size * (turn + 1), (0, 0) if look_once else self._patience
        return bool(self._kernels.reached(words[place], 0, times, *looks))

    def _until(self, over: Callable[[], bool], number: int) -> None:
        """Wait for other ranks at a sum until it is over: on the board and on the timeline.

        What does not wait is on neither: that takes no longer than to copy the array.
        """
        if over():
            return
        board, timeline, since = self._axis.transport.board, self._axis.ledger.timeline, clock()
        size, dtype = self._sums.shape[1], self._sums.dtype
        board.enter("sum", self._group, number + 1, size, dtype)
        try:
            while not over():
                time.sleep(NAP)
        finally:
            board.leave()
        if timeline is not None:
            nbytes = size * dtype.itemsize
            call = Call("accumulate", self._axis.name, nbytes, False, since, clock())
            timeline.calls.append(call)


def _layout(ranks: int, size: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Words and bytes of each place: for what is counted and for the numbers; for the sum."""
    blocks = kernels.compiled(dtype.name).running.blocks(size)
    width = -(-(2 * _LINE + ranks + blocks) // _LINE) * _LINE
    return width, -(-size * dtype.itemsize // (8 * _LINE)) * 8 * _LINE
