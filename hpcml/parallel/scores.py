"""Metrics beside the loss, such as accuracy: means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array

Metric = Callable[[Tensor, Any], float]
"""From outputs and targets of some samples to their mean."""


class Scores:
    """Adds up metrics microbatch by microbatch."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.begin()

    def begin(self) -> None:
        """Forget what was added."""
        self._sums = np.zeros(len(self.metrics) + 1)
        self._latest = np.zeros(len(self.metrics))

    def see(self, output: Tensor, target: Any) -> None:
        """Measure a microbatch."""
        self._latest[...] = [metric(output, target) for metric in self.metrics.values()]

    def count(self, weight: float) -> None:
        """Add what was seen last, if anything was: a rank may have no outputs."""
        self._sums[:-1] += weight * self._latest
        self._sums[-1] += weight
        self._latest[...] = 0

    def means(self, total: Callable[[Array], Array] | None, weight: float) -> dict[str, float]:
        """The metrics of all that was added. Collective, if there are any.

        total: adds up over the ranks, to `weight`; None: of this rank alone.
        """
        if not self.metrics:
            return {}
        if total is None:
            sums, weight = self._sums[:-1], float(self._sums[-1])
        else:
            sums = total(self._sums[:-1].copy())
        return dict(zip(self.metrics, (sums / (weight or np.nan)).tolist(), strict=True))
