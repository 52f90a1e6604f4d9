"""A training step whose model lies in stages on the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from hpcml import rng
from hpcml.autograd import Tensor
from hpcml.autograd.mode import mode
from hpcml.backend import Array, dtype, is_half, xp
from hpcml.errors import UserError
from hpcml.nn import Parameter
from hpcml.parallel import data
from hpcml.parallel.batch import as_tensor, samples_of
from hpcml.parallel.offload import Store
from hpcml.parallel.pipeline.actions import Action, Schedule
from hpcml.parallel.pipeline.assemble import Assembly
from hpcml.parallel.pipeline.find import find
from hpcml.parallel.pipeline.lowering import lower
from hpcml.parallel.pipeline.runtime import Runtime, Values
from hpcml.parallel.pipeline.transfers import Transfers
from hpcml.parallel.step import Step


class PipelineStep(Step):
    """A step by a schedule: microbatches pass the stages, each rank does its part of the table.

    Losses, gradients and parameters are those of `Step` (Huang et al. 2018, "GPipe"; Narayanan et
    al. 2019 and 2021): the update comes when all microbatches have been through.
    """

    def __init__(
        self, *args: Any, assembly: Assembly, schedule: str, chunks: int, activations: str = "keep",
        offload_dir: str = "", **options: Any,
    ) -> None:  # fmt: skip
        """As for `Step`, with what `assemble` made; for the others see `parallelize`."""
        super().__init__(*args, **options)
        if activations not in ("keep", "drop", "offload"):
            raise UserError(
                f'pipeline.activations="{activations}" is unknown: use keep, drop or offload'
            )
        self.drops = activations == "drop"
        self.store = Store(offload_dir) if activations == "offload" else None
        self.assembly, self.schedule, self.chunks = assembly, schedule, chunks
        self.pipeline = self.mesh["pp"]
        self._owners = self.mesh["pp", "dp"]
        self._stage = min(assembly.stages)
        self._last = len(assembly.rank_of) - 1
        self._transfers = Transfers(self.pipeline, self._device)
        self._program = cache(self._lowered)

    def plan(self, size: int) -> None:
        """See that the schedule fits batches of `size` samples; raises UserError if not."""
        if self.store is not None:
            self.store.open()
        self._program(data.rounds(size, self.microbatch, self.axis.size))

    def _lowered(self, microbatches: int) -> tuple[Action, ...]:
        """What this rank does in a step of so many microbatches."""
        assembly, sharding = self.assembly, self.groups.sharding
        chunks = self.chunks if self.chunks > 1 else None
        table = find(self.schedule, self.pipeline.size, microbatches, chunks)
        self._check(table)
        each = sharding.stage >= 2 or self.zero.deterministic
        lowered = lower(table, zero3=sharding.stage == 3, reduce_each=each)
        assert lowered.rank_of == assembly.rank_of
        return lowered.orders[self.pipeline.rank]

    def _check(self, table: Schedule) -> None:
        if table.rank_of != self.assembly.rank_of:
            raise UserError(
                f'pipeline.schedule="{self.schedule}" has stages on ranks {list(table.rank_of)}, '
                f"but the model was cut for {list(self.assembly.rank_of)}: a schedule must not "
                "change its stages with the number of microbatches"
            )

    # --- training -------------------------------------------------------------------------------

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        factor = self._begin(size, fresh=fresh)
        # All ranks of a pipeline, and all pipelines, go through the same table.
        parts = list(data.microbatches(size, self.microbatch, self.axis, lockstep=True))
        total = data.count(size, self.microbatch, self.axis.size)
        work = Microbatches(self, batch, first, parts, factor)
        program = self._program(data.rounds(size, self.microbatch, self.axis.size))
        Runtime(work, self._transfers, self.assembly.rank_of).run(program)
        self.current = -1
        return data.shares(work.losses, total)

    # --- forward alone --------------------------------------------------------------------------

    def _loss(self, fields: Sequence[Any]) -> Tensor:
        """The loss where the last stage is, else zero."""
        arrays = self.fields(fields)
        inputs = arrays if self.loss is None else arrays[:-1]
        out = self._through(inputs, tuple(np.shape(one) for one in arrays))
        return Tensor(np.zeros(())) if out is None else self.loss_of(out, arrays)

    def _outputs(self, inputs: Sequence[Tensor]) -> Array:
        out = self._through(inputs, ("predict", *(one.shape for one in inputs)))
        root = self.assembly.rank_of[self._last]
        mine = None if out is None else self.predicted(out)
        kind = ((), "") if mine is None else (mine.shape, mine.dtype.name)
        shape, name = self.pipeline.broadcast_object(kind, root)
        whole = np.empty(shape, dtype(name)) if mine is None else np.ascontiguousarray(mine.numpy())
        return self.pipeline.broadcast(whole, root, out=whole)

    def _through(self, inputs: Sequence[Tensor], key: Any) -> Any:
        """Forward through all stages; what the last one gives, on its rank."""
        rank_of, values, out = self.assembly.rank_of, tuple(inputs), None
        for number in sorted(self.assembly.stages):
            if number > 0 and rank_of[number - 1] != self.pipeline.rank:
                coming = self._transfers.receive(rank_of[number - 1], (number, key))
                values = tuple(map(Tensor, coming.wait()))
            try:
                out = self.run_stage(number, values, inputs)
            except Exception as error:
                if number < self._last and rank_of[number + 1] != self.pipeline.rank:
                    self._transfers.fail(rank_of[number + 1], (number + 1, key), str(error))
                raise
            values = out if isinstance(out, tuple) else (out,)
            if number < self._last and rank_of[number + 1] != self.pipeline.rank:
                arrays = [value.data for value in values]
                self._transfers.send(arrays, rank_of[number + 1], (number + 1, key))
        self._transfers.finish()
        return out if self._last in self.assembly.stages else None

    def run_stage(self, number: int, values: Values, inputs: Sequence[Tensor]) -> Any:
        """Forward of a stage; `inputs`: of the model, whose length the positions follow."""
        self.division.begin_stage(inputs)
        return self.assembly.stages[number](*values)

    def fields(self, fields: Sequence[Any]) -> list[Tensor]:
        """The fields of a microbatch as tensors."""
        return [as_tensor(field, self._dtype, self._device) for field in fields]

    def loss_of(self, out: Any, arrays: Sequence[Tensor]) -> Tensor:
        """The loss, given what the last stage gave."""
        return self.checked(out) if self.loss is None else self.judged(out, arrays[-1])

    # --- results --------------------------------------------------------------------------------

    @property
    def collective(self) -> bool:
        """True: no rank has all parameters."""
        return True

    def gathered(self) -> Iterator[tuple[str, Array]]:
        """See `Step.gathered`."""
        with self.settled():
            yield from self._joined(self.zero.gathered(), self.model.named_parameters())

    def gathered_gradients(self) -> Iterator[tuple[str, Array]]:
        """See `Step.gathered_gradients`."""
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        yield from self._joined(self.zero.gathered_gradients(), trained, gradients=True)

    def _joined(
        self,
        own: Iterator[tuple[str, Array]],
        named: Iterable[tuple[str, Parameter]],
        gradients: bool = False,
    ) -> Iterator[tuple[str, Array]]:
        """Each parameter's array, from the rank of the pipeline that has it."""
        owner = self._owner_of_names()
        for name, parameter in named:
            if owner[name] == self.pipeline.rank:
                given, array = next(own)
                assert given == name
                array = np.ascontiguousarray(array)
            else:
                wide = is_half(parameter.dtype) and parameter.requires_grad and not gradients
                kind = np.dtype(np.float32) if wide else parameter.dtype
                array = np.empty(parameter.whole_shape, kind)
            yield name, self.pipeline.broadcast(array, owner[name], out=array)
        for _ in own:
            raise AssertionError("more parameters than the model has")

    @cache  # noqa: B019 (a step lives as long as its run)
    def _owner_of_names(self) -> dict[str, int]:
        """Of each parameter the rank of the pipeline that has it."""
        mine = [name for name, _ in self.zero.held.named]
        every = self.pipeline.allgather_object(mine)
        return {name: rank for rank, names in enumerate(every) for name in names}


class Microbatches:
    """The microbatches of a batch, as the runtime asks for them."""

    def __init__(
        self, step: PipelineStep, batch: Any, first: int, parts: Sequence[data.Microbatch],
        factor: float,
    ) -> None:  # fmt: skip
        self.step, self.batch, self.first = step, batch, first
        self.parts, self.factor = parts, factor
        self.losses: list[tuple[data.Microbatch, Array]] = []
        self._fields: dict[int, list[Tensor]] = {}

    def fields(self, microbatch: int) -> list[Tensor]:
        """Its fields, loaded once."""
        if microbatch not in self._fields:
            part = self.parts[microbatch]
            self._fields[microbatch] = self.step.fields(samples_of(self.batch, part.samples))
        return self._fields[microbatch]

    def drops(self, stage: int) -> bool:
        """All stages but the last: there backward comes next."""
        return self.step.drops and stage + 1 < len(self.step.assembly.rank_of)

    def saving(self) -> AbstractContextManager[None]:
        """Within, what is saved is offloaded, if so chosen."""
        store = self.step.store
        return nullcontext() if store is None else store.offloaded()

    def inputs(self, microbatch: int) -> Values:
        """What the model is called with."""
        fields = self.fields(microbatch)
        return tuple(fields if self.step.loss is None else fields[:-1])

    def key(self, microbatch: int) -> Any:
        """Shapes of its fields."""
        return tuple(field.shape for field in self.fields(microbatch))

    def forward(self, stage: int, microbatch: int, inputs: Values) -> Any:
        """The outputs of a stage; of the last one the loss."""
        step, part = self.step, self.parts[microbatch]
        step.current = microbatch if mode.recording else -1  # it may be computed again
        again = mode.recording == self.drops(stage)  # forward for the second time
        counted = step.buffers.microbatch(microbatch, 0 if again else part.counted)
        with rng.samples(step.seed, self.first + part.samples.start), counted:
            out = step.run_stage(stage, inputs, self.inputs(microbatch))
            if stage < len(step.assembly.rank_of) - 1:
                return out
            loss = step.loss_of(out, self.fields(microbatch))
        step.scored(part.weight)
        if part.weight:
            self.losses.append((part, loss.data))
        return loss

    def loss_gradient(self, microbatch: int, loss: Tensor) -> Array:
        """By how much the loss counts."""
        weight = self.parts[microbatch].weight * self.factor
        return xp(loss.data).full(loss.shape, weight, loss.dtype)

    def before_backward(self, stage: int, microbatch: int, coming: Iterable[Tensor | None]) -> None:
        """Gradients of parameters come, contributions to these in this order."""
        last = microbatch + 1 == len(self.parts) and not self.step._holding
        real = self.parts[microbatch].weight > 0
        self.step.zero.before_backward(coming, real=real, last=last, stage=stage)

    def reduce(self, stage: int, microbatch: int) -> None:
        """They are complete, as far as this microbatch goes."""
        self.step.zero.after_backward()

    def update(self, stage: int, microbatch: int) -> None:
        """Not here: the update comes when all microbatches have been through."""
        raise AssertionError("an update in a synchronous table")

    def reshard(self) -> None:
        """Nobody needs gathered parameters for now."""
        self.step.zero.end_pass()
