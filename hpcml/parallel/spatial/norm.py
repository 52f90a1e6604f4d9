"""Statistics of batch normalisation over all of a sample, of which ranks have blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.comm import Axis


class Together:
    """Joins the statistics of an axis' ranks; see `hpcml.autograd.ops.norm.Across`.

    Forward is one all-gather of 2 C + 1 numbers, backward one all-reduce of 2 C (Ioffe and Szegedy
    2015, with sums over ranks).
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def moments(self, count: int, mean: Array, variance: Array) -> int:
        """Those of all ranks' elements, in place, by Chan et al. 1979; how many elements."""
        mine = np.concatenate([np.array([count]), mean, variance]).astype(np.float64)
        every = self.axis.allgather(mine).reshape(self.axis.size, -1)
        counts, means, variances = every[:, :1], *np.split(every[:, 1:], 2, axis=1)
        total = int(counts.sum())
        weights = counts / max(total, 1)
        joined = (weights * means).sum(axis=0)
        mean[...] = joined
        variance[...] = (weights * (variances + (means - joined) ** 2)).sum(axis=0)
        return total

    def total(self, sums: Array) -> Array:
        """The sum over the ranks."""
        found: Any = self.axis.allreduce(sums)
        return found
