"""Local SGD: ranks train by themselves and average their parameters now and then.

Stich 2019, "Local SGD converges fast and communicates little"; Lin et al. 2020, "Don't use large
mini-batches, use local SGD", which begins synchronously (post-local). With a period of H steps the
parameters travel once in H steps instead of the gradients in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.backend import Array
from hpcml.optim import clip_scale
from hpcml.parallel.step import Step


class LocalStep(Step):
    """Each rank updates from its own part of the batch; parameters are averaged every few steps.

    A rank's gradient counts `samples / batch * ranks`. With plain SGD (or momentum) and period 1
    the average is then the synchronous step exactly, for uneven batches too: the mean over ranks of
    x - lr N g_r is x - lr sum g_r. A rank without samples has a gradient of zero.

    The optimizer's state stays with its rank and is not averaged. Clipping is by the norm of the
    rank's own gradient; `grad_norm` is the mean of these norms over the ranks.
    """

    apart = True

    def __init__(self, *args: Any, period: int, sync_steps: int = 0, **options: Any) -> None:
        """As for `Step`, with the groups of ranks that are `apart`.

        period: steps between averages. sync_steps: steps at the beginning that are synchronous.
        """
        super().__init__(*args, **options)
        self.period, self.sync_steps = period, sync_steps
        self._differ = False  # whether ranks have trained apart since they were together

    @property
    def _joint(self) -> bool:
        """Whether the next update is a synchronous one."""
        return self.optimizer.steps < self.sync_steps

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        self._weight = 1.0 if self._joint else float(self.axis.size)
        return super()._accumulate(batch, size, first, fresh=fresh)

    def _conclude(self, batch: Any, first: int, losses: Array) -> float:
        updates = not self._holding
        norms = np.zeros(self.axis.size)
        if updates:
            factor = self.complete()
            own = norms[self.axis.rank] = self.zero.norm() * factor
        known = self.total(np.concatenate([losses, norms]))
        losses, norms = known[: losses.size], known[losses.size :]
        if updates:
            self.grad_norm = float(norms.mean())
        if not np.isfinite(known).all():
            raise self._failure(batch, first, losses)
        if updates:
            apart = not self._joint
            self.zero.update(clip_scale(own, self.grad_clip) * factor)
            if apart:
                self._differ = True
                if (self.optimizer.steps - self.sync_steps) % self.period == 0:
                    self._meet()
        return float(losses.sum())

    def complete(self) -> float:
        """Complete this rank's gradient; over the ranks where the next update is synchronous."""
        factor = super().complete()
        if self._joint:
            grad = self.optimizer.storage.grad
            self.axis.allreduce(grad, out=grad)
        return factor

    def _meet(self) -> None:
        """Average the parameters."""
        values = self.optimizer.storage.data
        self.axis.allreduce(values, out=values)
        values /= self.axis.size
        self._differ = False

    def settle(self) -> None:
        """Average the parameters, unless they are."""
        if self._differ:
            self._meet()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within, the parameters are the average; then each rank goes on from its own."""
        if not self._differ:
            yield
            return
        values, device = self.optimizer.storage.data, self.optimizer.storage.device
        own = memory.empty(values.shape, values.dtype, "buffers", device)
        own[...] = values
        self.settle()
        try:
            yield
        finally:
            values[...] = own
            self._differ = True
