"""Asynchronous data parallelism with a bound on how late a gradient may be.

Stale synchronous parallel (Ho et al. 2013, "More effective distributed ML via a stale synchronous
parallel parameter server") with delayed gradients (Langford, Smola, Zinkevich 2009, "Slow learners
are fast"). The parameter server is memory that the ranks share: each adds its gradient of step k
to sum k when it has it, waiting for nobody (`hpcml.comm.running`), and all make update k by that
sum, in the same order. A rank begins step k when it has made the updates up to k - 1 - bound, and
makes those after them as their sums come. So a rank may be ahead of another by as many steps as the
bound says, and at the same update all have the same parameters.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from hpcml.backend import Array, put
from hpcml.comm.running import running_sums
from hpcml.errors import UserError
from hpcml.optim import clip_scale
from hpcml.parallel.background import Staleness, advised
from hpcml.parallel.step import Step


@dataclass(frozen=True)
class _Made:
    """What is needed of a step when its update is made."""

    losses: Array
    """This rank's shares in the loss."""
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
        self._made: deque[_Made] = deque()  # of the sums that were not used yet
        with advised(bound):
            self._sums = running_sums(self.axis, storage.grad.size, storage.dtype, bound + 1)

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
        with advised(self.bound):
            self._sums.add(self.optimizer.storage.grad, math.fsum(losses))
        self._made.append(_Made(losses, factor, self.optimizer.settings(), batch, first))
        self._catch_up(0 if math.isnan(self._latest) else self.bound)
        return self._latest

    def _catch_up(self, most: int) -> None:
        """Make the updates whose sums have come; wait while more than `most` have not."""
        with advised(self.bound):
            while len(self._sums) > most or self._sums.ready():
                total, losses = self._sums.first()
                made, loss = self._made[0], math.fsum(losses)
                norm = self._take(total) * made.factor
                if math.isfinite(norm) and math.isfinite(loss):
                    self._drop()
                    self.grad_norm, self._latest = norm, loss
                    with self.optimizer.using(made.settings):
                        self.zero.update(clip_scale(norm, self.grad_clip) * made.factor)
                elif len(self._sums) > most:  # every rank is here, with the same ones under way
                    self.grad_norm = norm
                    while self._made:
                        self._sums.first()
                        self._drop()
                    raise self._failure(made.batch, made.first, self.total(made.losses))
                else:
                    return  # some are not so far: raise with them

    def _drop(self) -> None:
        """The first sum has been read: its place is free."""
        self._sums.drop()
        self._made.popleft()

    def _take(self, total: Array) -> float:
        """Let this be the gradient; its norm."""
        storage = self.optimizer.storage
        put(total, storage.grad)
        for parameter in storage.parameters:
            parameter.gradient = parameter.gradient_buffer
        return self.zero.norm()

    @property
    def _sum_scores(self) -> None:
        """Metrics of a batch are those of this rank's samples."""

    def settle(self) -> None:
        """Make all updates of the steps until now. Collective."""
        self._catch_up(0)
