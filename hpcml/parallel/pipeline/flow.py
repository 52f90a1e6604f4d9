"""What is under way in a pipeline that is never emptied, and the weights that it sees."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array, xp
from hpcml.parallel import data
from hpcml.parallel.norm import own_squares
from hpcml.parallel.pipeline.actions import Kind
from hpcml.parallel.pipeline.endless import Endless, Part
from hpcml.parallel.pipeline.runtime import Runtime, Values
from hpcml.parallel.pipeline.stash import Stash
from hpcml.parallel.pipeline.step import Microbatches, PipelineStep
from hpcml.parallel.pipeline.transfers import Transfers


class Batch(Microbatches):
    """A batch whose microbatches count in updates of their own, or of the whole batch."""

    def __init__(self, step: PipelineStep, batch: Any, size: int, first: int, whole: bool) -> None:
        parts = list(data.microbatches(size, step.microbatch, step.axis, lockstep=True))
        super().__init__(step, batch, first, parts, 1.0)
        self.count = data.count(size, step.microbatch, step.axis.size)
        self.settings = step.optimizer.settings()
        self._size, self._whole = size, whole

    def loss_gradient(self, microbatch: int, loss: Tensor) -> Array:
        """Its share in the loss of its update."""
        weight = self.parts[microbatch].weight
        if not self._whole:
            weight /= self._of_round(microbatch)
        return xp(loss.data).full(loss.shape, weight, loss.dtype)

    def _of_round(self, microbatch: int) -> float:
        """The share of the batch that data-parallel ranks compute at once."""
        ranks, total = self.step.axis.size, self.count
        numbers = range(microbatch * ranks, min((microbatch + 1) * ranks, total))
        parts = [data.part(n, self._size, self.step.microbatch, ranks) for n in numbers]
        samples: int = sum(part.stop - part.start for part in parts)
        return samples / self._size

    def completes(self, microbatch: int) -> bool:
        """Whether an update follows on its backward."""
        return not self._whole or microbatch + 1 == len(self.parts)


class Flow:
    """A table without an end under way: its microbatches, and the weights that each of them sees.

    It is what the runtime asks (see `runtime.Work`); microbatches are numbered from where the table
    began, those of a batch from 0.
    """

    _latest: Batch

    def __init__(self, step: PipelineStep, table: Endless, transfers: Transfers) -> None:
        self.step, self.table = step, table
        self.stash = Stash(step.optimizer.storage)
        self.squares = np.zeros(2)
        """Of the last update's gradient: see `own_squares`."""
        self._runtime = Runtime(self, transfers, step.assembly.rank_of)
        self._taken = 0
        self._of: dict[int, tuple[Batch, int]] = {}
        self._version: dict[int, int] = {}
        self._last_update = -1
        step.zero.begin()

    def take(self, batch: Batch) -> None:
        """Carry out what there is to do until the last microbatch of the batch has come in."""
        first, number = self._taken, len(batch.parts)
        part = self.table.part(first, number)
        self._of |= {first + index: (batch, index) for index in range(number)}
        self._version |= part.versions(min(self.step.assembly.stages))
        self._taken += number
        self._latest = batch
        self._run(part)

    def drain(self) -> None:
        """Carry out what is left to do."""
        self._run(self.table.part(self._taken, 0))

    def _run(self, part: Part) -> None:
        actions = part.actions(self.step.pipeline.rank)
        updates = [action.microbatch for action in actions if action.kind is Kind.UPDATE]
        self._last_update = max(updates, default=-1)
        try:
            self._runtime.run(actions)
        finally:
            self.stash.show(self.stash.newest)

    # --- what the runtime asks ------------------------------------------------------------------

    def inputs(self, microbatch: int) -> Values:
        """What the first stage is called with."""
        batch, index = self._of[microbatch]
        return batch.inputs(index)

    def key(self, microbatch: int) -> Any:
        """What shapes of activations depend on."""
        batch, index = self._of[microbatch]
        return batch.key(index)

    def drops(self, stage: int) -> bool:
        """Whether activations of a stage are computed again."""
        return self._latest.drops(stage)

    def saving(self) -> AbstractContextManager[None]:
        """Within, what backward needs is kept."""
        return self._latest.saving()

    def forward(self, stage: int, microbatch: int, inputs: Values) -> Any:
        """The outputs of a stage, with the weights that the microbatch sees."""
        self.stash.show(self._version[microbatch])
        batch, index = self._of[microbatch]
        return batch.forward(stage, index, inputs)

    def loss_gradient(self, microbatch: int, loss: Tensor) -> Array:
        """By how much the loss counts."""
        batch, index = self._of[microbatch]
        return batch.loss_gradient(index, loss)

    def before_backward(self, stage: int, microbatch: int, coming: Iterable[Tensor | None]) -> None:
        """Gradients come: of the weights that forward has seen."""
        self.stash.show(self._version[microbatch])
        batch, index = self._of[microbatch]
        real = batch.parts[index].weight > 0
        last = batch.completes(index)
        self.step.zero.before_backward(coming, real=real, last=last, stage=stage)

    def reduce(self, stage: int, microbatch: int) -> None:
        """Not asked for: an update reduces gradients itself."""

    def reshard(self) -> None:
        """Not asked for: weights are not sharded."""

    def update(self, stage: int, microbatch: int) -> None:
        """Update the newest weights; versions that no later microbatch uses go."""
        step, zero, (batch, _) = self.step, self.step.zero, self._of[microbatch]
        self.stash.show(self.stash.newest)
        zero.after_backward()
        zero.finish()
        if microbatch == self._last_update:
            self.squares = own_squares(zero.storage, step.groups, zero.held)
        self.stash.advance(self._version.get(microbatch + 1, self.stash.newest + 1))
        with step.optimizer.using(batch.settings):
            zero.update()
        zero.begin()
        for done in [number for number in self._of if number <= microbatch]:
            del self._of[done], self._version[done]
