"""Sums over the ranks that are under way while training goes on, and how late they are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import DTypeLike

from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.comm.request import Request
from hpcml.errors import MemoryLimitError


class Sums:
    """All-reduces of flat arrays in the background, in order, `most` + 1 of them at a time.

    Every rank starts the same ones in the same order, each when it comes to it; a sum is there when
    all have started it.
    """

    def __init__(self, axis: Axis, size: int, dtype: DTypeLike, most: int) -> None:
        """Arrays of `size` elements; with `most` sums under way there is room for another."""
        self._axis, self._started, self._most = axis, 0, most
        with self.advised():
            self._slots = [axis.empty(size, dtype) for _ in range(most + 1)]
        self._pending: deque[tuple[Request, Any]] = deque()

    @contextmanager
    def advised(self) -> Iterator[None]:
        """Add to a `MemoryLimitError` from inside, of a sum under way too, what needs less."""
        try:
            yield
        except MemoryLimitError as error:
            fewer = f"data_parallel.staleness={self._most - 1}, " if self._most else ""
            error.advise(
                f"{self._most + 1} sums of all parameters have memory of their own; what needs "
                f"less: {fewer}data_parallel.mode=sync with a higher zero.stage, a smaller model"
            )
            raise

    def __len__(self) -> int:
        return len(self._pending)

    def slot(self) -> Array:
        """The array for the next one, with any values."""
        return self._slots[self._started % len(self._slots)]

    def start(self, note: Any = None) -> None:
        """Begin to add up what was put into `slot()`; `note` comes back with the sum."""
        slot = self.slot()
        self._started += 1
        self._pending.append((self._axis.iallreduce(slot, out=slot), note))

    def ready(self) -> bool:
        """Whether `first` would return at once."""
        return bool(self._pending) and self._pending[0][0].test()

    def first(self) -> tuple[Array, Any]:
        """The first sum that was not dropped, once it is there, with its note."""
        request, note = self._pending[0]
        return request.wait(), note

    def drop(self) -> None:
        """The first sum has been used: its place is free."""
        self._pending.popleft()

    def drop_all(self) -> None:
        """Wait for all of them and forget them. Only where every rank has started the same."""
        for request, _ in self._pending:
            request.wait()
        self._pending.clear()


class Staleness:
    """How many updates were missing in the parameters from which something was computed."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        """How often it was how many."""
        self.last = 0

    def add(self, missing: int) -> None:
        """Take note of one."""
        self.last = missing
        self.counts[missing] += 1

    @property
    def mean(self) -> float:
        """Over the run."""
        total = sum(missing * times for missing, times in self.counts.items())
        return total / max(self.counts.total(), 1)

    @property
    def max(self) -> int:
        """Over the run."""
        return max(self.counts, default=0)

    def record(self) -> dict[str, float]:
        """For the metrics: of the last one, and over the run."""
        return {"last": self.last, "mean": self.mean, "max": self.max}
