"""Asynchronous data parallelism with a bound on how late a gradient may be.

Stale synchronous parallel (Ho et al. 2013, "More effective distributed ML via a stale synchronous
parallel parameter server") with delayed gradients (Langford, Smola, Zinkevich 2009, "Slow learners
are fast"), and no server: every rank makes the same updates in the same order. Update k is by the
sum of all ranks' gradients of step k, an all-reduce in the background. A rank begins step k when
it has made the updates up to k - 1 - bound, and makes those after them as their sums come. So a
rank may be ahead of another by as many steps as the bound says, and at the same update all have
the same parameters.

Why not one-sided MPI windows: no library that installs from a wheel moves data into another node's
window while that rank computes; it waits for the target's next call, so that the rank that is late
delays the others as before. Why not a server: it is a rank that trains nothing, and all gradients
go through its one link. The bound on staleness is the same.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from hpcml.backend import Array
from hpcml.comm.request import Request
from hpcml.errors import UserError
from hpcml.optim import clip_scale
from hpcml.parallel.background import Staleness, Sums
from hpcml.parallel.step import Step


@dataclass(frozen=True)
class _Made:
    """What is needed of a step when its update is made."""

    losses: Request
    """The shares in the loss, summed over the ranks."""
    factor: float
    settings: list[dict[str, Any]]
    """The optimizer's, by group, as they were: ranks come to the update at different steps."""
    batch: Any
    first: int


class StaleStep(Step):
    """One gradient for each call, and the updates whose sums have come.

    A call returns the loss of the newest update made here, step `optimizer.steps` - 1, and
    `grad_norm` is of the same; that is this step where `bound` is 0. The first call waits for its
    own update. `staleness` holds how many updates of earlier steps the gradients of this rank
    lacked, never more than `bound`.

    Where a sum is not finite, all ranks raise NonFiniteError in the same call, up to `bound` calls
    later; what was under way is lost.
    """

    apart = True
    staleness: Staleness

    def __init__(self, *args: Any, bound: int, **options: Any) -> None:
        """As for `Step`, with the groups of ranks that are `apart`."""
        super().__init__(*args, **options)
        self.bound, self.staleness = bound, Staleness()
        self._latest = math.nan  # loss of the newest update
        storage = self.optimizer.storage
        self._sums = Sums(self.axis, storage.grad.size, storage.dtype, bound)

    def no_sync(self) -> AbstractContextManager[None]:
        """Refused: each step is an update."""
        raise UserError(
            "no_sync() with data_parallel.mode=async: every step starts its sum; give one batch "
            "with a smaller microbatch instead"
        )

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        self._catch_up(self.bound)
        self.staleness.add(len(self._sums))
        return super()._accumulate(batch, size, first, fresh=fresh)

    def _conclude(self, batch: Any, first: int, losses: Array) -> float:
        factor = self.complete()
        self._sums.slot()[...] = self.optimizer.storage.grad
        with self._sums.advised():
            request = self.axis.iallreduce(losses, out=losses)
            self._sums.start(_Made(request, factor, self.optimizer.settings(), batch, first))
        self._catch_up(0 if math.isnan(self._latest) else self.bound)
        return self._latest

    def _catch_up(self, most: int) -> None:
        """Make the updates whose sums have come; wait while more than `most` have not."""
        with self._sums.advised():
            while len(self._sums) > most or self._sums.ready():
                total, made = self._sums.first()
                losses = made.losses.wait()
                norm = self._take(total) * made.factor
                if math.isfinite(norm) and math.isfinite(losses.sum()):
                    self.grad_norm, self._latest = norm, math.fsum(losses)
                    with self.optimizer.using(made.settings):
                        self.zero.update(clip_scale(norm, self.grad_clip) * made.factor)
                    self._sums.drop()
                elif len(self._sums) > most:  # every rank is here, with the same ones under way
                    self.grad_norm = norm
                    self._sums.drop_all()
                    self._refusals.tell(self.axis, losses)
                    raise self._failure(made.batch, made.first, losses)
                else:
                    return  # some are not so far: raise with them

    def _take(self, total: Array) -> float:
        """Let this be the gradient; its norm."""
        storage = self.optimizer.storage
        storage.grad[...] = total
        for parameter in storage.parameters:
            parameter.gradient = parameter.gradient_buffer
        return self.zero.norm()

    @property
    def _sum_scores(self) -> None:
        """Metrics of a batch are those of this rank's samples."""

    def settle(self) -> None:
        """Make all updates of the steps until now. Collective."""
        self._catch_up(0)
