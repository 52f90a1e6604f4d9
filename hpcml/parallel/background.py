"""What sums that are under way while training goes on have in common: their memory, how late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hpcml.errors import MemoryLimitError


@contextmanager
def advised(bound: int) -> Iterator[None]:
    """Add to a `MemoryLimitError` from inside, of a sum under way too, what needs less."""
    try:
        yield
    except MemoryLimitError as error:
        fewer = f"data_parallel.staleness={bound - 1}, " if bound else ""
        error.advise(
            f"{bound + 1} sums of all parameters have memory of their own; what needs "
            f"less: {fewer}data_parallel.mode=sync with a higher zero.stage, a smaller model"
        )
        raise


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
