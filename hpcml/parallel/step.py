"""A training step of a model on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from hpcml import rng
from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.nn import Module
from hpcml.nn.evaluation import evaluating
from hpcml.optim import Optimizer, clip_scale
from hpcml.parallel import data
from hpcml.parallel.arena import Arena
from hpcml.parallel.background import Staleness
from hpcml.parallel.batch import as_tensor, samples_of, size_of
from hpcml.parallel.data import Microbatch
from hpcml.parallel.finite import describe
from hpcml.parallel.gradients import Gradients
from hpcml.parallel.groups import Groups
from hpcml.parallel.limits import advised
from hpcml.parallel.precision import LossScaler
from hpcml.parallel.replicas import check_replicas
from hpcml.parallel.shards import Shards, gather, gathered

LossFunction = Callable[..., Tensor]

# A run that diverges says so once, by its loss; NumPy need not warn before.
_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Step:
    """One update of the parameters for each call; see `parallelize`.

    After a call `grad_norm` holds the norm of the whole gradient before clipping; with float16 it
    is infinite or not-a-number where the step was skipped because its gradient overflowed.
    """

    apart = False
    """Whether the ranks' parameters may differ between calls."""
    staleness: Staleness | None = None
    """How late gradients were, where they may be."""

    def __init__(
        self, model: Module, loss: LossFunction | None, optimizer: Optimizer, mesh: Mesh,
        groups: Groups, *, microbatch: int, grad_clip: float, seed: int, overlap: bool | None,
    ) -> None:  # fmt: skip
        """`overlap`: communicate in the background; None: where that gains."""
        self.model, self.loss, self.optimizer, self.mesh = model, loss, optimizer, mesh
        self.microbatch, self.grad_clip, self.seed = microbatch, grad_clip, seed
        self.axis, self.groups = mesh["dp"], groups
        self.samples = 0  # samples of all steps so far, over all ranks
        self.grad_norm = math.nan
        storage = optimizer.storage
        self._dtype = storage.dtype
        self.scaler = LossScaler() if storage.dtype == np.float16 else None
        overlap = groups.all.overlaps if overlap is None else overlap
        arena = Arena(lambda size: groups.shard.empty(size, storage.dtype))
        self.gradients = Gradients(storage, groups, arena, overlap, mesh.deterministic)
        self.shards: Shards | None = None
        if not groups.sharding.whole("params"):
            self.shards = Shards(model, storage, groups.shard, arena, overlap)
        self._holding = False
        self._held = 0  # samples whose gradients wait for more
        self._unit = 0  # samples that the gradients are divided by
        self._weight = 1.0  # by which this rank's gradient counts

    # --- training -------------------------------------------------------------------------------

    @_quiet
    def __call__(self, batch: Any) -> float:
        """Compute the gradient of the batch's mean loss, update, return that loss.

        batch: the samples of all ranks, the same on every rank: a tuple of arrays with samples
        along dimension 0, or something that gives such a tuple for a slice and knows its `len`
        (then a rank loads only its own). Raises NonFiniteError, before the update, on all ranks.
        """
        size, first = size_of(batch), getattr(batch, "first", self.samples)
        at_once = min(size, self.microbatch or -(-size // self.axis.size))
        with advised(self.optimizer, self.groups.sharding, at_once):
            losses = self._accumulate(batch, size, first)
        self.samples, self._held = first + size, self._held + size
        return self._conclude(batch, first, losses)

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

    def _accumulate(self, batch: Any, size: int, first: int) -> Array:
        """Add the gradients of a batch; the share of each own microbatch in its mean loss."""
        total = data.count(size, self.microbatch, self.axis.size)
        if self._held == 0:
            self._unit = size
            self.model.zero_grad()  # what the optimizer leaves out would add up for ever
            rounds = -(-total // self.axis.size)
            self.gradients.begin(2 if self._holding else rounds)
        losses = np.zeros(total)
        factor = size / self._unit * self._weight * (self.scaler.scale if self.scaler else 1.0)
        for part in self._microbatches(size, self.gradients.lockstep):
            self.gradients.before_backward(
                real=part.weight > 0, last=part.last and not self._holding
            )
            with rng.samples(self.seed, first + part.samples.start):
                loss = self._loss(samples_of(batch, part.samples))
                if part.weight:
                    losses[part.number] = loss.item() * part.weight
                loss.backward(np.full(loss.shape, part.weight * factor, loss.dtype))
            self.gradients.after_backward()
            self._end_pass(whole=True)
        return losses

    def _conclude(self, batch: Any, first: int, losses: Array) -> float:
        """Bring the ranks together and update; the loss, given this rank's shares in it."""
        losses = self._sum(losses)
        if not np.isfinite(losses).all():
            self.grad_norm = math.nan
            raise self._failure(batch, first, losses)
        if not self._holding:
            self._finish(batch, first, losses)
        return math.fsum(losses)

    def _complete(self) -> float:
        """Complete the gradient; the factor by which it counts."""
        self.gradients.finish()
        factor = self._unit / self._held / (self.scaler.scale if self.scaler else 1.0)
        self._held = 0
        return factor

    def _finish(self, batch: Any, first: int, losses: Array) -> None:
        """Reduce the gradients, and update unless they overflowed."""
        factor = self._complete()
        self.grad_norm = self._norm() * factor
        good = math.isfinite(self.grad_norm)
        if not good and (self.scaler is None or self.scaler.exhausted):
            raise self._failure(batch, first, losses)
        if good:
            self._update(clip_scale(self.grad_norm, self.grad_clip) * factor)
        if self.scaler is not None:
            self.scaler.update(overflow=not good)

    def _norm(self) -> float:
        """Norm of the gradient as it lies in memory."""
        squares = self.optimizer.storage.squares()
        if self.groups.sharding.stage > 0:
            if not self.mesh.deterministic:  # there, additions have one order in every layout
                squares = squares.sum(keepdims=True)
            self.groups.shard.allreduce(squares, out=squares)
        return math.sqrt(squares.sum())

    def _update(self, scale: float) -> None:
        """Update what this rank owns; bring the parameters together if all ranks hold them."""
        self.optimizer.step(scale)
        sharding = self.groups.sharding
        if sharding.whole("params") and not sharding.whole("optim"):
            for bucket in self.optimizer.storage.trained:
                own = bucket.data[sharding.block(bucket)]
                gather(bucket, own, bucket.data, self.groups.shard, sharding)

    def _microbatches(self, size: int, lockstep: bool) -> Iterator[Microbatch]:
        return data.microbatches(
            size, self.microbatch, self.axis, lockstep or self.shards is not None
        )

    def _end_pass(self, whole: bool) -> None:
        if self.shards is not None:
            self.shards.end(whole)

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
        return self.axis.size > 1 and (self.apart or self.groups.sharding.stage > 0)

    @_quiet
    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over the samples of `batches`, divided among the ranks.

        Raises NonFiniteError, on all ranks.
        """
        total, count = 0.0, 0
        with self.settled(), evaluating(self.model):
            for batch in batches:
                size = size_of(batch)
                for part in self._microbatches(size, lockstep=False):
                    loss = self._loss(samples_of(batch, part.samples))
                    if part.weight:
                        total += loss.item() * (part.samples.stop - part.samples.start)
                    self._end_pass(whole=False)
                count += size
        if count == 0:
            raise UserError("evaluate() got no samples: give it at least one batch")
        mean = float(self._sum(np.array([total]))[0]) / count
        if not math.isfinite(mean):
            raise NonFiniteError(f"validation loss {mean}: lower the learning rate")
        return mean

    @_quiet
    def try_batch(self, fields: Sequence[Any]) -> None:
        """Evaluate the loss of a batch's fields and forget it: raises what a step would raise."""
        with evaluating(self.model):
            self._loss(fields)
        self._end_pass(whole=False)

    def gathered(self) -> Iterator[tuple[str, Array]]:
        """Each parameter once, by name, with its most exact values (float32 for 16-bit types).

        No rank holds more than one bucket beyond what it holds anyway; values are valid until the
        next are asked for. Collective: all ranks go through all of it.
        """
        storage = self.optimizer.storage
        named = self.model.named_parameters()
        with self.settled():
            yield from gathered(named, storage, self.groups.shard, storage.masters)

    def check_replicas(self) -> None:
        """Raise `ReplicaError` unless what several ranks hold is the same to the bit."""
        if self.shards is None:
            with self.settled():
                check_replicas(self.model.named_parameters(), self.axis)
        else:
            buckets = self.optimizer.storage.buckets
            mine = ((bucket.parameters[0].name, Tensor(bucket.data)) for bucket in buckets)
            check_replicas(mine, self.groups.replica)

    def _loss(self, fields: Sequence[Any]) -> Tensor:
        arrays = [as_tensor(field, self._dtype) for field in fields]
        if self.loss is None:
            loss = self.model(*arrays)
        else:
            loss = self.loss(self.model(*arrays[:-1]), arrays[-1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss must be a tensor of one element, the mean over samples, not {found}"
            )
        return loss

    def _sum(self, values: Array) -> Array:
        return self.axis.allreduce(values, out=values)

    def _failure(self, batch: Any, first: int, losses: Array) -> NonFiniteError:
        """The error of a loss or gradient that is not finite, with where that began. Collective."""
        self._held = 0  # the gradients are of no use
        bad = int(np.argmin(np.isfinite(losses)))  # all ranks look at the same microbatch
        part = data.part(bad, size_of(batch), self.microbatch, self.axis.size)

        def run() -> Tensor:
            with rng.samples(self.seed, first + part.start):
                return self._loss(samples_of(batch, part))

        storage = self.optimizer.storage
        trained = [(n, p) for n, p in self.model.named_parameters() if id(p) in storage.home]
        gradients = gathered(trained, storage, self.groups.shard, storage.sums)
        where = describe(self.gathered(), self.model, run, gradients)
        self._end_pass(whole=False)
        return NonFiniteError(
            f"step {self.optimizer.steps}: loss {losses.sum()}, gradient norm {self.grad_norm}: "
            f"training cannot go on; {where or 'nothing is left of where it began'}; lower the "
            "learning rate, clip the gradient or look at the data"
        )
