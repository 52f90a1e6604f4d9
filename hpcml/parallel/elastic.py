"""Elastic averaging: ranks train by themselves, tied to a centre by a spring.

Zhang, Choromanska, LeCun 2015, "Deep learning with elastic averaging SGD", algorithm 1. Every rank
holds a copy of the centre instead of a server, and adds its difference to the sum by which all
move theirs when it has it, waiting for nobody (`hpcml.comm.running`).
"""

from __future__ import annotations

from typing import Any

from hpcml import memory
from hpcml.backend import kind, to_kind, xp
from hpcml.comm.running import running_sums
from hpcml.parallel.background import Staleness, advised
from hpcml.parallel.local import LocalStep


class ElasticStep(LocalStep):
    """Every `period` steps a rank moves by alpha (centre - own), the centre by the opposites' sum.

    Only the averaging is asynchronous: for the loss, a few bytes, ranks wait for each other in
    every step, so that none is far ahead of another and sums are late only where messages are.
    Rounds count for `bound` what steps count for `StaleStep`: a rank begins a round as soon as the
    centre has the sums of all rounds but the last `bound`; `staleness` holds how many it lacked.
    Results are those of the centre. With N ranks it moves by N / (N + 1) of what ranks by
    themselves would, as one more that is drawn along: the learning rate may be larger by
    (N + 1) / N.
    """

    staleness: Staleness

    def __init__(self, *args: Any, alpha: float, bound: int, **options: Any) -> None:
        """As for `LocalStep`; alpha times the number of ranks is at most 1."""
        super().__init__(*args, **options)
        self.alpha, self.bound, self.staleness = alpha, bound, Staleness()
        own, device = self.optimizer.storage.data, self.optimizer.storage.device
        with advised(bound):
            self._sums = running_sums(self.axis, own.size, own.dtype, bound + 1)
            self._difference = memory.empty(own.shape, own.dtype, "buffers", device)
            self.center = memory.empty(own.shape, own.dtype, "buffers", device)
        self.center[...] = own

    def _meet(self) -> None:
        """One round."""
        self._catch_up(self.bound)
        self.staleness.add(len(self._sums))
        own, difference = self.optimizer.storage.data, self._difference
        xp(own).subtract(own, self.center, out=difference)
        difference *= self.alpha
        own -= difference
        with advised(self.bound):
            self._sums.add(difference)
        self._catch_up(self.bound)

    def _catch_up(self, most: int) -> None:
        """Move the centre by the sums that have come; wait while more than `most` have not."""
        with advised(self.bound):
            while len(self._sums) > most or self._sums.ready():
                self.center += to_kind(self._sums.first()[0], kind(self.center))
                self._sums.drop()

    def settle(self) -> None:
        """Let every rank have the centre, all rounds included."""
        self._catch_up(0)
        self.optimizer.storage.data[...] = self.center
        self._differ = False
