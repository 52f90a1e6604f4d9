"""What a rank holds: bytes by category, counted by any number of threads, and their limit."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from hpcml.errors import MemoryLimitError

CATEGORIES = ("params", "grads", "optim", "activations", "buffers")
_UNSETTLED = 256
"""Changes that an account leaves to be added up: few enough to take no room."""


class Account:
    """Bytes by category: `live[category]` now, `peak[category]` since `reset_peak`.

    `total` and `peak_total` are the same over all categories, and `limit` what `total` may reach
    (0: no limit; see `memory.set_limit`). Any number of threads may count in it at once. A peak is
    the most that all of them held together, in the order in which they took and gave back: bytes
    are given back in the moment before their memory is free.

    Changes are noted in a log and added up when somebody asks. Appending to a deque is one step,
    whichever threads do it, and costs less than a lock; nor could `__del__` wait for a lock, since
    the garbage collector may call it in a thread that has it.
    """

    def __init__(self) -> None:
        self.limit = 0
        self.log: deque[tuple[str, int]] = deque()
        """Category and bytes (negative if given back) of what has not been added up."""
        self._live = dict.fromkeys(CATEGORIES, 0)
        self._peak = dict.fromkeys(CATEGORIES, 0)
        self._total = self._peak_total = 0
        self._adding = threading.RLock()  # not Lock: signals and finalizers may ask meanwhile

    @property
    def live(self) -> dict[str, int]:
        """Bytes by category now."""
        self._settle()
        return dict(self._live)

    @property
    def peak(self) -> dict[str, int]:
        """The most bytes of each category."""
        self._settle()
        return dict(self._peak)

    @property
    def total(self) -> int:
        """Bytes now."""
        self._settle()
        return self._total

    @property
    def peak_total(self) -> int:
        """The most bytes at once."""
        self._settle()
        return self._peak_total

    def reset_peak(self) -> None:
        """Start a new measurement of the peaks."""
        with self._adding:
            self._add_up()
            self._peak.update(self._live)
            self._peak_total = self._total

    def take(self, category: str, nbytes: int) -> tuple[str, int]:
        """Count `nbytes` more in `category`; what to append to the log when they are given back.

        Raises MemoryLimitError if they would exceed the limit, KeyError for an unknown category.
        """
        if category not in self._live:
            raise KeyError(category)
        if self.limit:
            self._admit(category, nbytes, take=True)
        else:
            self.log.append((category, nbytes))
            if len(self.log) > _UNSETTLED:
                self._settle()
        return category, -nbytes

    def require(self, category: str, nbytes: int) -> None:
        """Raise MemoryLimitError if `nbytes` more in `category` would exceed the limit."""
        if self.limit:
            self._admit(category, nbytes, take=False)

    def _admit(self, category: str, nbytes: int, take: bool) -> None:
        if not self._fit(category, nbytes, take):
            gc.collect()  # arrays in cycles of references are nobody's any more
            if not self._fit(category, nbytes, take):
                remedy = "hold less, or set a higher limit"
                raise self.refusal(category, nbytes, self.limit, "the memory limit of", remedy)

    def _fit(self, category: str, nbytes: int, take: bool) -> bool:
        """Whether the limit allows `nbytes` more, which are then taken before others may ask."""
        with self._adding:
            self._add_up()
            fit = self._total + nbytes <= self.limit
            if fit and take:
                self.log.append((category, nbytes))
            return fit

    def _settle(self) -> None:
        with self._adding:
            self._add_up()

    def _add_up(self) -> None:
        """Empty the log into the sums; while nobody else does."""
        log, live, peak = self.log, self._live, self._peak
        before, change, most = self._total, 0, 0
        try:
            while log:
                category, nbytes = log.popleft()
                own = live[category] = live[category] + nbytes
                change += nbytes
                if own > peak[category]:
                    peak[category] = own
                if change > most:
                    most = change
        except IndexError:  # a finalizer has asked meanwhile
            pass
        finally:
            self._total += change
            self._peak_total = max(self._peak_total, before + most)

    def refusal(
        self, category: str, nbytes: int, limit: int, what: str, remedy: str
    ) -> MemoryLimitError:
        """The error for `nbytes` of `category` that exceed `what` there is, `limit` bytes."""
        live = self.live
        total = sum(live.values())
        rows = {**live, "in use": total, f"asked for ({category})": nbytes,
                "limit": limit}  # fmt: skip
        return MemoryLimitError(
            f"{nbytes:,} bytes of {category} exceed {what} {limit:,}, of which {total:,} are "
            f"in use: {remedy}\n"
            f"{table({name: (f'{size:,}',) for name, size in rows.items()}, ('bytes',))}",
            live=live, category=category, request=nbytes, limit=limit,
        )  # fmt: skip


def table(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Return the table "where did all the memory go": name -> a text for each column."""
    lines = [("where did all the memory go", *columns)]
    lines += [(f"  {name}", *cells) for name, cells in rows.items()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in lines
    )
