"""Statistics of batch normalisation over ranks.

Of all of a sample, of which ranks have blocks; and on request of the samples of all data-parallel
ranks, as PyTorch's SyncBatchNorm takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml.backend import Array, put, to_kind, xp
from hpcml.comm import Axis, Mesh
from hpcml.errors import UserError
from hpcml.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Module

NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


@dataclass
class Turn:
    """Which microbatches go through batch norm together: one of each data-parallel rank."""

    counts: bool = True
    """Whether this rank's samples count, or are computed for company."""


class Together:
    """Joins the statistics of an axis' ranks; see `hpcml.autograd.ops.norm.Across`.

    Forward is one all-gather of 2 C + 1 numbers, backward one all-reduce of 2 C (Ioffe and Szegedy
    2015, with sums over ranks).
    """

    def __init__(self, axis: Axis, turn: Turn | None = None) -> None:
        self.axis, self.turn = axis, turn or Turn()

    def moments(self, count: int, mean: Array, variance: Array) -> int:
        """Those of all ranks' elements, in place, by Chan et al. 1979; how many elements."""
        if not self.turn.counts:
            count = 0
        own = to_kind(xp(mean).concatenate([mean, variance]), "cpu")
        mine = np.concatenate([np.array([count]), own]).astype(np.float64)
        every = self.axis.allgather(mine).reshape(self.axis.size, -1)
        counts, means, variances = every[:, :1], *np.split(every[:, 1:], 2, axis=1)
        total = int(counts.sum())
        weights = counts / max(total, 1)
        joined = (weights * means).sum(axis=0)
        put(joined, mean)
        put((weights * (variances + (means - joined) ** 2)).sum(axis=0), variance)
        return total

    def total(self, sums: Array) -> Array:
        """The sum over the ranks; zeros for samples that did not count: no statistic is of them."""
        found: Any = self.axis.allreduce(sums)
        return found if self.turn.counts else xp(found).zeros_like(found)


def turn_of(mesh: Mesh, wanted: bool, mode: str) -> Turn | None:
    """What ranks take statistics together in, if they are to; raises UserError if they cannot."""
    if not wanted or mesh["dp"].size == 1:
        return None
    if mode != "sync":
        raise UserError(
            f"data_parallel.sync_batchnorm=true with data_parallel.mode={mode}: ranks that train "
            "apart do not meet in forward: use mode=sync, or sync_batchnorm=false"
        )
    if mesh["pp"].size > 1:
        raise UserError(
            f"data_parallel.sync_batchnorm=true with mesh.pp={mesh['pp'].size}: stages of a "
            "pipeline compute at times of their own: set mesh.pp=1, or sync_batchnorm=false"
        )
    return Turn()


def synchronise(model: Module, axis: Axis, turn: Turn) -> None:
    """Let all batch norms of a model take their statistics over the ranks of the axis."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.across = Together(axis, turn)
