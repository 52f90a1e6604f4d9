"""A training step of a model on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from hpcml import kernels, rng
from hpcml.autograd import Tensor, contributions
from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.nn import Module
from hpcml.optim import clip_scale
from hpcml.parallel import data
from hpcml.parallel.background import Staleness
from hpcml.parallel.batch import size_of
from hpcml.parallel.division import Division
from hpcml.parallel.finite import Finding, describe, quiet
from hpcml.parallel.limits import advised
from hpcml.parallel.pipeline.actions import Kind
from hpcml.parallel.placed import PlacedModel
from hpcml.parallel.precision import LossScaler
from hpcml.parallel.scores import Metric
from hpcml.parallel.spatial.grid import NAMES
from hpcml.parallel.zero import Zero

LossFunction = Callable[..., Tensor]


class Step(PlacedModel):
    """One update of the parameters for each call; see `parallelize`.

    The way of a batch: `compute` (its microbatches forward and backward), the loss of all ranks,
    `complete` (the gradient of all ranks), clipping, the update.

    After a call `grad_norm` holds the norm of the whole gradient before clipping; with float16 it
    is infinite or not-a-number where the step was skipped because its gradient overflowed, and
    `scores` the metrics of the batch, before the update.
    """

    _stage = 0
    """Of a pipeline, the first that this rank has."""
    current = -1
    """Of this rank's microbatches in a batch, the one in forward; -1 outside of training."""
    staleness: Staleness | None = None
    """How late gradients were, where they may be."""

    def __init__(
        self, model: Module, division: Division, mesh: Mesh, zero: Zero, *,
        microbatch: int, grad_clip: float, seed: int, metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, division, mesh, zero, microbatch=microbatch, metrics=metrics)
        self.optimizer, self.grad_clip, self.seed = zero.optimizer, grad_clip, seed
        self.samples = 0  # samples of all steps so far, over all ranks
        self.grad_norm = math.nan
        self.scores: dict[str, float] = {}
        self.scaler = LossScaler() if self._dtype == np.float16 else None
        self._holding = False
        self._held = 0  # samples whose gradients wait for more
        self._unit = 0  # samples that the gradients are divided by
        self._compared = False  # whether ranks that divide the model have one loss
        self._weight = 1.0  # by which this rank's gradient counts

    def plan(self, size: int) -> None:
        """See that a step of `size` samples can be made; raises UserError if not."""

    @quiet
    def __call__(self, batch: Any) -> float:
        """Compute the gradient of the batch's mean loss, update, return that loss.

        batch: the samples of all ranks, the same on every rank: a tuple of arrays with samples
        along dimension 0, or something that gives such a tuple for a slice and knows its `len`
        (then a rank loads only its own). Raises NonFiniteError, before the update, on all ranks.
        """
        before, first = self.samples, getattr(batch, "first", self.samples)
        self._scores.begin()
        losses = self.compute(batch)
        try:
            with advised(self.optimizer, self.groups.sharding):
                loss = self._conclude(batch, first, losses)
        except BaseException:  # what an error leaves of a gradient is of no use
            self._held, self.samples = 0, before
            raise
        self.scores = self._scores.means(self._sum_scores, 1.0)
        return loss

    @quiet
    def compute(self, batch: Any) -> Array:
        """What a call begins with: add a batch's gradient to what is under way.

        Returns the share of each microbatch in the batch's mean loss, where it is this rank's own;
        what it refuses is raised on all ranks when these are summed (`total`). `complete` comes
        next.
        """
        size, first = size_of(batch), getattr(batch, "first", self.samples)
        at_once = min(size, self.microbatch or -(-size // self.axis.size))
        held, self._held = self._held, 0  # what an error leaves of a gradient is of no use
        losses = np.full(data.count(size, self.microbatch, self.axis.size), np.nan)
        with (
            self._refusals.kept(self._each_alone),
            advised(self.optimizer, self.groups.sharding, at_once),
            kernels.repeatable(self.mesh.deterministic),
        ):
            losses = self._accumulate(batch, size, first, fresh=held == 0)
        self.current = -1
        self.samples, self._held = first + size, held + size
        return losses

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        """Add the gradients of a batch; the share of each own microbatch in its mean loss.

        fresh: to none of batches before.
        """
        factor = self._begin(size, fresh=fresh)
        made: list[tuple[data.Microbatch, Array]] = []
        parts = data.microbatches(size, self.microbatch, self.axis, self._lockstep)
        for self.current, part in enumerate(parts):
            loss = self._learn(batch, first, part, factor)
            if part.weight:
                made.append((part, loss))
        total = data.count(size, self.microbatch, self.axis.size)
        return data.shares(made, total)  # not before: it waits for a GPU

    def _begin(self, size: int, *, fresh: bool) -> float:
        """A batch begins; by what the gradient of its mean loss counts."""
        rounds = data.rounds(size, self.microbatch, self.axis.size)
        if fresh:
            self._unit = size
            self.zero.begin(2 if self._holding else rounds)
        self.buffers.begin(rounds, fresh=fresh)
        return size / self._unit * self._weight * (self.scaler.scale if self.scaler else 1.0)

    def _learn(self, batch: Any, first: int, part: data.Microbatch, factor: float) -> Array:
        """Forward and backward of a microbatch; its mean loss."""
        span = self.mesh.ledger.span
        if self.division.turn is not None:
            self.division.turn.counts = part.weight > 0
        with rng.samples(self.seed, first + part.samples.start):
            counted = self.buffers.microbatch(self.current, part.counted)
            with span(Kind.FORWARD, 0, part.number), counted:
                loss = self._loss(self.division.fields(batch, part.samples))
            self.scored(part.weight)
            last = part.last and not self._holding
            self.zero.before_backward(contributions(loss), real=part.weight > 0, last=last)
            with span(Kind.BACKWARD, 0, part.number):
                loss.backward(np.full(loss.shape, part.weight * factor, loss.dtype))
        self.zero.after_backward()
        return loss.data

    def _conclude(self, batch: Any, first: int, losses: Array) -> float:
        """Bring the ranks together and update; the loss, given this rank's shares in it."""
        losses = self.total(losses)
        self._compare(losses)
        if not np.isfinite(losses).all():
            self.grad_norm = math.nan
            raise self._failure(batch, first, losses)
        if not self._holding:
            self._finish(batch, first, losses)
        return math.fsum(losses)

    def _finish(self, batch: Any, first: int, losses: Array) -> None:
        """Reduce the gradients, and update unless they overflowed."""
        factor = self.complete()
        self.grad_norm = self.zero.norm() * factor
        good = math.isfinite(self.grad_norm)
        if not good and (self.scaler is None or self.scaler.exhausted):
            raise self._failure(batch, first, losses)
        if good:
            self.zero.update(clip_scale(self.grad_norm, self.grad_clip) * factor)
        if self.scaler is not None:
            self.scaler.update(overflow=not good)

    def complete(self) -> float:
        """Complete the gradient over the ranks; the factor by which it counts. Collective."""
        self.zero.finish()
        factor = self._unit / self._held / (self.scaler.scale if self.scaler else 1.0)
        self.buffers.complete(None if self.apart else self._owners, self._held)
        self._held = 0
        return factor

    def no_sync(self) -> AbstractContextManager[None]:
        """Steps inside add to the gradient only; the next one outside updates from all of them.

        The update is that of one large batch. For stages 0 and 1, which reduce gradients once.
        """
        stage = self.groups.sharding.stage
        if stage >= 2:
            raise UserError(
                f"no_sync() with zero={stage}: gradients are sharded after every microbatch, so "
                "nothing is saved; use zero=0 or 1, or one batch with a smaller microbatch"
            )
        return self._hold()

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    # --- what else a step knows -------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Batches of which the parameters have learned."""
        return self.optimizer.steps

    @property
    def _lockstep(self) -> bool:
        """Whether ranks need each other in forward or backward."""
        return self.zero.lockstep or self.division.turn is not None

    def _each_alone(self) -> bool:
        """Whether no rank waits for another in the forward and backward under way."""
        return self._owners.size > 1 and not self._lockstep and self.mesh["pp"].size == 1

    @property
    def _sum_scores(self) -> Callable[[Array], Array] | None:
        """How metrics of a batch are added up over the ranks; None where they do not wait."""
        return self.total

    # --- errors -----------------------------------------------------------------------------------

    def _compare(self, losses: Array) -> None:
        """Once, see that ranks which divide the model have one loss: each has all of it."""
        axis = self.mesh["cp", *NAMES, "tp"]
        if self._compared or axis.size == 1:
            return
        self._compared = True
        every = axis.allgather(losses.sum(keepdims=True))
        if not np.allclose(every, every[0], rtol=1e-6, atol=0, equal_nan=True):
            shown = ", ".join(f"{loss:.9g}" for loss in every)
            raise UserError(
                f"ranks that divide {type(self.model).__name__} have different losses ({shown}): "
                "something that each has whole is made of what it has in part; hpcml check names "
                "the layer"
            )

    def _failure(self, batch: Any, first: int, losses: Array) -> NonFiniteError:
        """The error of a loss or gradient that is not finite, with where that began. Collective."""
        bad = int(np.argmin(np.isfinite(losses)))  # all ranks look at the same microbatch
        part = data.part(bad, size_of(batch), self.microbatch, self.axis.size)

        def run() -> Tensor:
            with rng.samples(self.seed, first + part.start), self.buffers.microbatch(0, 0):
                return self._loss(self.division.fields(batch, part))

        def agree(found: Finding | None) -> str:  # some may have seen it: of what ranks divide, ...
            axes = ("dp",) * self.apart + ("pp", "cp", *NAMES, "tp")  # ... or have each for itself
            every = self.mesh[axes].allgather_object((self._stage, found))
            first = min((f for f in every if f[1]), key=_place, default=(0, ""))
            return str(first[1])

        gradients = self.gathered_gradients()
        where = describe(self.gathered(), self.model, run, gradients, agree)
        self.zero.end_pass()
        return NonFiniteError(
            f"step {self.steps}: loss {losses.sum()}, gradient norm {self.grad_norm}: "
            f"training cannot go on; {where or 'nothing is left of where it began'}; lower the "
            "learning rate, clip the gradient or look at the data"
        )


def _place(found: tuple[int, Any]) -> tuple[int, int]:
    stage, finding = found
    return stage, finding.place
