"""A model on the ranks of a mesh, and what can be asked of it without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.nn import Module
from hpcml.nn.evaluation import evaluating
from hpcml.parallel import data
from hpcml.parallel.batch import as_tensor, size_of
from hpcml.parallel.buffers import Buffers
from hpcml.parallel.division import Division
from hpcml.parallel.finite import quiet
from hpcml.parallel.limits import advised
from hpcml.parallel.refusals import Refusals
from hpcml.parallel.replicas import ReplicaError, check_replicas
from hpcml.parallel.scores import Metric, Scores
from hpcml.parallel.zero import Zero


class PlacedModel:
    """A model whose samples, tensors and states lie on the ranks of a mesh.

    It gives losses, metrics, outputs and values, the same on all ranks.
    """

    apart = False
    """Whether the ranks' parameters may differ."""

    def __init__(
        self, model: Module, division: Division, mesh: Mesh, zero: Zero, *,
        microbatch: int, metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.mesh, self.zero = model, mesh, zero
        self.division, self.loss = division, division.loss
        self.groups, self.microbatch = zero.groups, microbatch
        self.axis = mesh["dp"]
        self._owners = self.axis  # of the shares in a loss
        self._dtype, self._device = zero.storage.dtype, zero.storage.device
        self._refusals = Refusals()
        self._scores = Scores(division.metrics(metrics or {}))
        self.buffers = Buffers(model, mesh.deterministic)
        self.buffers.broadcast(self.groups.dp)

    # --- the loss ---------------------------------------------------------------------------------

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

    def total(self, values: Array) -> Array:
        """Sum over the ranks that have different shares, in place. Collective.

        Where one of them has refused something, all raise that.
        """
        summed: Array = self._owners.allreduce(values, out=values)
        self._refusals.tell(self._owners, summed)
        return summed

    # --- evaluation -------------------------------------------------------------------------------

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
                with self._refusals.kept(lambda: alone):
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
        samples = size_of(batch)
        with (
            advised(self.zero.optimizer, self.groups.sharding, samples),
            evaluating(self.model),
        ):
            self._loss(self.division.fields(batch, slice(0, samples)))
        self.zero.end_pass()

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
        return self.predicted(self.model(*inputs)).numpy()

    def predicted(self, outputs: Any) -> Tensor:
        """Outputs, if they are a tensor."""
        if not isinstance(outputs, Tensor):
            raise UserError(
                f"predict() of a model that returns a {type(outputs).__name__}: it must be a tensor"
            )
        return outputs

    # --- where ranks may be apart -----------------------------------------------------------------

    def settle(self) -> None:
        """Bring the ranks together after the last step, where they may be apart. Collective."""

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within, the parameters are those that training would end with here. Collective."""
        self.settle()
        yield

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within, parameters and buffers are those that training would end with. Collective."""
        with self.settled():
            if not self.apart:
                yield
                return
            with self.buffers.averaged(self.axis):
                yield

    # --- values -----------------------------------------------------------------------------------

    @property
    def collective(self) -> bool:
        """Whether it takes all ranks to know the parameters."""
        if self.groups.tp.size > 1:
            return True
        return self.groups.dp.size > 1 and (self.apart or self.groups.sharding.stage > 0)

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
