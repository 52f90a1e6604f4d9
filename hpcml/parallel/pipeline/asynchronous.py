"""Pipelines that are never emptied: updates while other microbatches are under way.

PipeDream (Narayanan et al. 2019, "PipeDream: generalized pipeline parallelism for DNN training",
section 3.3) makes an update after every microbatch, PipeDream-2BW (Narayanan et al. 2021,
"Memory-efficient pipeline-parallel DNN training", section 3.1) after every batch. Forward and
backward of a microbatch use one version of a stage's weights, and the update is of the newest:

    pipedream                 w(t+1) = w(t) - lr grad f(w_1(t-n+1), w_2(t-n+2), ..., w_n(t))
    pipedream, vertical sync  w(t+1) = w(t) - lr grad f(w_1(t-n+1), w_2(t-n+1), ..., w_n(t-n+1))
    pipedream-2bw             w(t+1) = w(t) - lr grad f(w(t-1))

with n stages, w_s(t) the weights of stage s after t updates, and w(t) = w(0) for t < 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.errors import UserError
from hpcml.parallel import data
from hpcml.parallel.finite import quiet
from hpcml.parallel.norm import root
from hpcml.parallel.pipeline.actions import Action
from hpcml.parallel.pipeline.endless import Endless
from hpcml.parallel.pipeline.find import find
from hpcml.parallel.pipeline.flow import Batch, Flow
from hpcml.parallel.pipeline.step import PipelineStep


class AsynchronousStep(PipelineStep):
    """A step whose batch passes the pipeline behind the one before, without waiting for its end.

    A call goes as far as the last microbatch of its batch has passed the last stage, and returns
    the mean loss of the batch, each microbatch with the weights that it has seen. The updates of
    the last microbatches come in the next call, or in `settle`. What the optimizer is set to for a
    call (the learning rate) holds for the updates of its batch, whenever they come.

    With "pipedream" every microbatch is an update, by the gradient of its own mean loss (with
    data-parallel ranks one microbatch of each). With "pipedream-2bw" every batch is one, by the
    gradient of the batch's mean loss; batches have as many microbatches as each other.

    `settle` empties the pipeline; then the next call begins a new table, with the newest weights on
    all stages. So do evaluation, `predict` and `gathered`: all stages then have had the updates of
    all samples so far.

    `grad_norm` is of the gradients of each stage's newest update in the last call, 0 before there
    is one. Where it or the loss is not finite, NonFiniteError is raised on all ranks: by then
    updates have been made with it.
    """

    def __init__(self, *args: Any, vertical_sync: bool = False, **options: Any) -> None:
        """As for `PipelineStep`; raises UserError for what needs all gradients at once."""
        super().__init__(*args, **options)
        self.vertical_sync = vertical_sync
        self._per_batch = self.schedule == "pipedream-2bw"
        self._calls = 0
        self._flow: Flow | None = None
        self._table = cache(self._endless)
        self._refuse()

    def _refuse(self) -> None:
        with_, or_ = f'with pipeline.schedule="{self.schedule}"', "or pipeline.schedule=1f1b"
        if self.mesh.deterministic:
            raise UserError(
                f"run.deterministic=true {with_}, whose result depends on the number of stages: "
                f"use run.deterministic=false, {or_}"
            )
        if self.groups.sharding.stage > 0:
            raise UserError(
                f"zero={self.groups.sharding.stage} {with_}, which keeps versions of whole "
                f"weights: use zero=0, {or_}"
            )
        if self.grad_clip > 0:
            raise UserError(
                f"grad_clip={self.grad_clip} {with_}, where no stage waits for the norm of the "
                f"whole gradient: use grad_clip=0, {or_}"
            )
        if self.scaler is not None:
            raise UserError(
                f"parameters of float16 {with_}, where no stage waits to see if another's gradient "
                f"overflows: use bfloat16 or float32, {or_}"
            )
        for tie in self.assembly.held.ties:
            raise UserError(
                f"{tie.first.name} is used on ranks {tie.ranks[0]} and {tie.ranks[1]} of the "
                f"pipeline {with_}, which updates them at different times: untie the weights (GPT: "
                f"model.tie_embeddings=false), {or_}"
            )

    def _every(self, microbatches: int) -> int:
        """Microbatches an update, where a batch has so many."""
        return microbatches if self._per_batch else 1

    def _endless(self, every: int) -> Endless:
        ranks = self.pipeline.size
        if self._per_batch and every < ranks - 1:
            raise UserError(
                f'{every} microbatches a batch with pipeline.schedule="{self.schedule}" on {ranks} '
                f"ranks: a batch would begin before the weights it needs: let it have {ranks - 1} "
                "or more (train.microbatch)"
            )
        return Endless(
            lambda total: find(
                self.schedule, ranks, total, self.chunks if self.chunks > 1 else None,
                vertical_sync=self.vertical_sync or None,
                update_every=every if self._per_batch else None,
            ),
            every,
        )  # fmt: skip

    def _lowered(self, microbatches: int) -> tuple[Action, ...]:
        part = self._table(self._every(microbatches)).part(0, microbatches)
        self._check(part.schedule)
        return part.schedule.orders[self.pipeline.rank]

    # --- training -------------------------------------------------------------------------------

    def _accumulate(self, batch: Any, size: int, first: int, *, fresh: bool) -> Array:
        given = Batch(self, batch, size, first, self._per_batch)
        every = self._every(len(given.parts))
        if self._flow is None:
            self._flow = Flow(self, self._table(every), self._transfers)
        elif every != self._flow.table.every:
            raise UserError(
                f"a batch of {every} microbatches after one of {self._flow.table.every} with "
                f'pipeline.schedule="{self.schedule}": let all have as many, or call settle()'
            )
        self.buffers.begin(len(given.parts), fresh=True)
        try:
            self._flow.take(given)
        except BaseException:
            self._flow = None  # an error leaves nothing to go on from
            raise
        return data.shares(given.losses, given.count)

    def _conclude(self, batch: Any, first: int, losses: Array) -> float:
        assert self._flow is not None
        self.buffers.complete(self._owners, self._held)
        self._held = 0
        self._compare(losses)
        losses = self.total(losses)
        self.grad_norm = root(self._flow.squares, self.groups)
        if not (np.isfinite(losses).all() and math.isfinite(self.grad_norm)):
            self._flow = None  # all messages have come: nobody waits for the rest
            raise self._failure(batch, first, losses)
        self._calls += 1
        return math.fsum(losses)

    @property
    def steps(self) -> int:
        """How many batches have come in."""
        return self._calls

    def no_sync(self) -> AbstractContextManager[None]:
        """Refused: gradients do not wait for more."""
        raise UserError(
            f'no_sync() with pipeline.schedule="{self.schedule}": updates follow at once; give one '
            "larger batch to pipedream-2bw instead"
        )

    @quiet
    def settle(self) -> None:
        """Let what is under way come to its end: the pipeline is empty then. Collective."""
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.drain()

    def gathered_gradients(self) -> Iterator[tuple[str, Array]]:
        """The gradients of the last update; see `Step.gathered_gradients`."""
        with self.settled():
            yield from super().gathered_gradients()
