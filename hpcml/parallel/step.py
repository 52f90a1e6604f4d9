"""A training step of a model on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from hpcml import backend, rng
from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.nn import Module
from hpcml.nn.evaluation import evaluating
from hpcml.optim import clip_scale
from hpcml.parallel import data
from hpcml.parallel.background import Staleness
from hpcml.parallel.batch import as_tensor, size_of
from hpcml.parallel.buffers import Buffers
from hpcml.parallel.division import Division
from hpcml.parallel.finite import Finding, describe
from hpcml.parallel.limits import advised
from hpcml.parallel.pipeline.actions import Kind
from hpcml.parallel.precision import LossScaler
from hpcml.parallel.refusals import Refusals
from hpcml.parallel.replicas import ReplicaError, check_replicas
from hpcml.parallel.scores import Metric, Scores
from hpcml.parallel.spatial.grid import NAMES
from hpcml.parallel.zero import Zero

LossFunction = Callable[..., Tensor]

quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
"""A run that diverges says so once, by its loss; NumPy need not warn before."""


class Step:
    """One update of the parameters for each call; see `parallelize`.

    After a call `grad_norm` holds the norm of the whole gradient before clipping; with float16 it
    is infinite or not-a-number where the step was skipped because its gradient overflowed, and
    `scores` the metrics of the batch, before the update.
    """

    _stage = 0
    """Of a pipeline, the first that this rank has."""
    current = -1
    """Of this rank's microbatches in a batch, the one in forward; -1 outside of training."""
    apart = False
    """Whether the ranks' parameters may differ between calls."""
    staleness: Staleness | None = None
    """How late gradients were, where they may be."""

    def __init__(
        self, model: Module, division: Division, mesh: Mesh, zero: Zero, *,
        microbatch: int, grad_clip: float, seed: int, metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.mesh, self.zero = model, mesh, zero
        self.division, self.loss = division, division.loss
        self.optimizer, self.groups = zero.optimizer, zero.groups
        self.microbatch, self.grad_clip, self.seed = microbatch, grad_clip, seed
        self.axis = mesh["dp"]
        self._owners = self.axis  # of the shares in a loss
        self.samples = 0  # samples of all steps so far, over all ranks
        self.grad_norm = math.nan
        self._dtype, self._device = zero.storage.dtype, zero.storage.device
        self.scaler = LossScaler() if self._dtype == np.float16 else None
        self._holding = False
        self._held = 0  # samples whose gradients wait for more
        self._unit = 0  # samples that the gradients are divided by
        self._compared = False  # whether ranks that divide the model have one loss
        self._weight = 1.0  # by which this rank's gradient counts
        self._refusals = Refusals()
        self.scores: dict[str, float] = {}
        self._scores = Scores(division.metrics(metrics or {}))
        self.buffers = Buffers(model, mesh.deterministic)
        self.buffers.broadcast(self.groups.dp)

    def plan(self, size: int) -> None:
        """See that a step of `size` samples can be made; raises UserError if not."""

    # --- training -------------------------------------------------------------------------------

    @quiet
    def __call__(self, batch: Any) -> float:
        """Compute the gradient of the batch's mean loss, update, return that loss.

        batch: the samples of all ranks, the same on every rank: a tuple of arrays with samples
        along dimension 0, or something that gives such a tuple for a slice and knows its `len`
        (then a rank loads only its own). Raises NonFiniteError, before the update, on all ranks.
        """
        first = getattr(batch, "first", self.samples)
        self._scores.begin()
        loss = self._conclude(batch, first, self.compute(batch))
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
        alone = self._owners.size > 1 and not self._lockstep and self.mesh["pp"].size == 1
        with (
            self._refusals.kept(alone=alone),
            advised(self.optimizer, self.groups.sharding, at_once),
        ):
            losses = self._accumulate(batch, size, first, fresh=held == 0)
        self.current = -1
        self.samples, self._held = first + size, held + size
        return losses

    @property
    def _lockstep(self) -> bool:
        """Whether ranks need each other in forward or backward."""
        return self.zero.lockstep or self.division.turn is not None

    @property
    def steps(self) -> int:
        """Batches of which the parameters have learned."""
        return self.optimizer.steps

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

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        """Add the gradients of a batch; the share of each own microbatch in its mean loss.

        fresh: to none of batches before.
        """
        total = data.count(size, self.microbatch, self.axis.size)
        rounds = -(-total // self.axis.size)
        if fresh:
            self._unit = size
            self.zero.begin(2 if self._holding else rounds)
        self.buffers.begin(rounds, fresh=fresh)
        losses, span = np.zeros(total), self.mesh.ledger.span
        factor = size / self._unit * self._weight * (self.scaler.scale if self.scaler else 1.0)
        parts = data.microbatches(size, self.microbatch, self.axis, self._lockstep)
        made: list[tuple[data.Microbatch, Array]] = []
        for self.current, part in enumerate(parts):
            last = part.last and not self._holding
            if self.division.turn is not None:
                self.division.turn.counts = part.weight > 0
            with rng.samples(self.seed, first + part.samples.start):
                counted = self.buffers.microbatch(self.current, part.counted)
                with span(Kind.FORWARD, 0, part.number), counted:
                    loss = self._loss(self.division.fields(batch, part.samples))
                self.scored(part.weight)
                if part.weight:
                    made.append((part, loss.data))
                self.zero.before_backward(real=part.weight > 0, last=last)
                with span(Kind.BACKWARD, 0, part.number):
                    loss.backward(np.full(loss.shape, part.weight * factor, loss.dtype))
            self.zero.after_backward()
        values = backend.numbers([value for _, value in made])  # not before: it waits for a GPU
        for (part, _), value in zip(made, values, strict=True):
            losses[part.number] = value * part.weight
        return losses

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

    def complete(self) -> float:
        """Complete the gradient over the ranks; the factor by which it counts. Collective."""
        self.zero.finish()
        factor = self._unit / self._held / (self.scaler.scale if self.scaler else 1.0)
        self.buffers.complete(None if self.apart else self._owners, self._held)
        self._held = 0
        return factor

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

    def settle(self) -> None:
        """Bring the ranks together after the last step, where they may be apart. Collective."""

    # --- evaluation and results -----------------------------------------------------------------

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within, the parameters are those that training would end with here. Collective."""
        self.settle()
        yield

    @property
    def collective(self) -> bool:
        """Whether it takes all ranks to know the parameters."""
        if self.groups.tp.size > 1:
            return True
        return self.groups.dp.size > 1 and (self.apart or self.groups.sharding.stage > 0)

    def predict(self, *inputs: Any) -> Array:
        """Outputs of the model in evaluation, whole and the same on every rank. Collective.

        inputs: arrays of all samples, as the model takes them.
        """
        with self._together(), self.division.whole_outputs(), evaluating(self.model):
            given = self.division.inputs(inputs)
            outputs = self._outputs([as_tensor(one, self._dtype, self._device) for one in given])
            self.zero.end_pass()
        return outputs

    def _outputs(self, inputs: Sequence[Tensor]) -> Array:
        made = self.model(*inputs)
        if not isinstance(made, Tensor):
            raise UserError(
                f"predict() of a model that returns a {type(made).__name__}: it must be a tensor"
            )
        return made.numpy()

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over the samples of `batches`, divided among the ranks.

        Raises NonFiniteError, on all ranks.
        """
        return self.measure(batches)["loss"]

    @quiet
    def measure(self, batches: Iterable[Any]) -> dict[str, float]:
        """Like `evaluate`, with the metrics: means over all samples, "loss" among them."""
        total, count = 0.0, 0
        self._scores.begin()
        alone = self._owners.size > 1 and not self.zero.gathers and self.mesh["pp"].size == 1
        with self._together(), evaluating(self.model):
            for batch in batches:
                share = math.nan
                with self._refusals.kept(alone=alone):
                    share = self._measured(batch)
                total += share
                count += size_of(batch)
        if count == 0:
            raise UserError("evaluate() got no samples: give it at least one batch")
        mean = float(self.total(np.array([total]))[0]) / count
        if not math.isfinite(mean):
            raise NonFiniteError(f"validation loss {mean}: lower the learning rate")
        return {"loss": mean, **self._scores.means(self.total, count)}

    def _measured(self, batch: Any) -> float:
        """The sum of losses over this rank's samples of a batch."""
        size, total = size_of(batch), 0.0
        for part in data.microbatches(size, self.microbatch, self.axis, self.zero.gathers):
            loss = self._loss(self.division.fields(batch, part.samples))
            self.scored(part.counted)
            if part.weight:
                total += loss.item() * part.counted
            self.zero.end_pass()
        return total

    @quiet
    def try_batch(self, batch: Any) -> None:
        """Evaluate the loss of a batch and forget it: raises what a step would raise."""
        with evaluating(self.model):
            self._loss(self.division.fields(batch, slice(0, size_of(batch))))
        self.zero.end_pass()

    def gathered(self) -> Iterator[tuple[str, Array]]:
        """Each parameter once, by name, with its most exact values (float32 for 16-bit types).

        No rank holds more than one bucket beyond what it holds anyway; values are valid until the
        next are asked for. Collective: all ranks go through all of it.
        """
        with self.settled():
            yield from self.zero.gathered()

    def gathered_buffers(self) -> dict[str, Array]:
        """The buffers of the model, such as running estimates, by name. Collective."""
        with self._together():
            return self.division.whole_buffers(self.model)

    def gathered_gradients(self) -> Iterator[tuple[str, Array]]:
        """Likewise the complete gradients of the parameters that are trained."""
        return self.zero.gathered_gradients()

    def check_replicas(self) -> None:
        """Raise `ReplicaError` unless what several ranks hold is the same to the bit."""
        groups = self.groups
        axis = groups.dp if groups.sharding.whole("params") else groups.replica
        found = ""
        with self.settled():
            for along, whole in ((axis, False), (groups.tp, True)):
                try:
                    check_replicas(self.zero.replicas(whole), along)
                except ReplicaError as error:
                    found = found or str(error)
        reports = list(filter(None, self.mesh.world.allgather_object(found)))
        if reports:
            raise ReplicaError(reports[0])

    def _loss(self, fields: Sequence[Any]) -> Tensor:
        arrays = [as_tensor(field, self._dtype, self._device) for field in fields]
        if self.loss is None:
            return self.checked(self.model(*arrays))
        return self.judged(self.model(*arrays[:-1]), arrays[-1])

    def judged(self, outputs: Any, target: Tensor) -> Tensor:
        """The loss of outputs; the metrics are noted."""
        assert self.loss is not None
        loss = self.checked(self.loss(outputs, target))
        self._scores.see(outputs, target)
        return loss

    def checked(self, loss: Any) -> Tensor:
        """A loss, if it is one."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss must be a tensor of one element, the mean over samples, not {found}"
            )
        return loss

    def scored(self, weight: float) -> None:
        """Let the metrics of the microbatch that was judged last count."""
        self._scores.count(weight)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within, parameters and buffers are those that training would end with. Collective."""
        with self.settled():
            if not self.apart:
                yield
                return
            with self.buffers.averaged(self.axis):
                yield

    @property
    def _sum_scores(self) -> Callable[[Array], Array] | None:
        """How metrics of a batch are added up over the ranks; None where they do not wait."""
        return self.total

    def total(self, values: Array) -> Array:
        """Sum over the ranks that have different shares, in place. Collective.

        Where one of them has refused something, all raise that.
        """
        summed: Array = self._owners.allreduce(values, out=values)
        self._refusals.tell(self._owners, summed)
        return summed

    def _failure(self, batch: Any, first: int, losses: Array) -> NonFiniteError:
        """The error of a loss or gradient that is not finite, with where that began. Collective."""
        self._held = 0  # the gradients are of no use
        bad = int(np.argmin(np.isfinite(losses)))  # all ranks look at the same microbatch
        part = data.part(bad, size_of(batch), self.microbatch, self.axis.size)

        def run() -> Tensor:
            with rng.samples(self.seed, first + part.start), self.buffers.microbatch(0, 0):
                return self._loss(self.division.fields(batch, part))

        def agree(found: Finding | None) -> str:  # of what ranks divide, some may have seen it
            every = self.mesh["pp", "cp", *NAMES, "tp"].allgather_object((self._stage, found))
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
