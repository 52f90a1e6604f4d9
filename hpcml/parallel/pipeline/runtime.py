"""A rank's part of a schedule, carried out: a table of what each kind of action does.

It knows no schedule by name. What to do in which order is the table's affair (`lowering`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hpcml.autograd import Context, Tensor, no_grad, primitive
from hpcml.autograd.backward import Deferred, backward, contributions
from hpcml.backend import Array, xp
from hpcml.parallel.pipeline.actions import Action, Kind
from hpcml.parallel.pipeline.transfers import Incoming, Transfers

Values = tuple[Any, ...]


class Work(Protocol):
    """What the runtime asks of the step that it belongs to."""

    def forward(self, stage: int, microbatch: int, inputs: Values) -> Any:
        """The outputs of a stage; of the last one the loss."""

    def drops(self, stage: int) -> bool:
        """Whether a stage keeps its inputs only, and computes forward again before backward."""

    def saving(self) -> AbstractContextManager[None]:
        """Within, what is saved for backward goes where it shall be until then."""

    def inputs(self, microbatch: int) -> Values:
        """What the first stage is called with."""

    def loss_gradient(self, microbatch: int, loss: Tensor) -> Array:
        """By how much the loss counts."""

    def before_backward(self, stage: int, microbatch: int, coming: Iterable[Tensor | None]) -> None:
        """Gradients of parameters come, contributions to these in this order."""

    def reduce(self, stage: int, microbatch: int) -> None:
        """They are complete, as far as this microbatch goes."""

    def update(self, stage: int, microbatch: int) -> None:
        """It completes a batch of an asynchronous schedule: new weights."""

    def reshard(self) -> None:
        """Nobody needs gathered parameters for now."""

    def key(self, microbatch: int) -> Any:
        """What shapes of activations depend on."""


@dataclass
class _Kept:
    """What forward of a stage and microbatch has left for backward."""

    inputs: Values
    outputs: list[Tensor]
    deferred: Deferred | None = None


@dataclass
class Runtime:
    """Carries out actions, one after the other."""

    work: Work
    transfers: Transfers
    rank_of: Sequence[int]
    kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    """By stage and microbatch."""

    def __post_init__(self) -> None:
        self._coming: dict[tuple[Kind, int, int], Incoming | list[Array]] = {}
        self._going: dict[tuple[Kind, int, int], list[Array]] = {}
        self._do: Mapping[Kind, Callable[[int, int], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT: self._input,
            Kind.WEIGHT: self._weight,
            Kind.SEND_F: lambda s, m: self._send(Kind.SEND_F, s, m),
            Kind.SEND_B: lambda s, m: self._send(Kind.SEND_B, s, m),
            Kind.RECV_F: lambda s, m: self._receive(Kind.RECV_F, s, m),
            Kind.RECV_B: lambda s, m: self._receive(Kind.RECV_B, s, m),
            Kind.UNSHARD: lambda s, m: None,  # parameters come when they are asked for
            Kind.RESHARD: lambda s, m: self.work.reshard(),
            Kind.REDUCE: self.work.reduce,
            Kind.UPDATE: self.work.update,
            Kind.RELEASE: lambda s, m: self.kept.__delitem__((s, m)),
        }

    def run(self, actions: Iterable[Action]) -> None:
        """Carry them out; when this returns, all has been sent, and all that was asked for came."""
        span = self.transfers.axis.ledger.span
        for stage, kind, microbatch in actions:
            with span(kind, stage, microbatch):
                self._do[kind](stage, microbatch)
        self.transfers.finish()
        for coming in self._coming.values():
            if isinstance(coming, Incoming):
                coming.wait()

    # --- compute --------------------------------------------------------------------------------

    def _forward(self, stage: int, microbatch: int) -> None:
        if stage == 0:
            inputs = self.work.inputs(microbatch)
        else:
            arrays = self._arrived(Kind.RECV_F, stage, microbatch)
            inputs = tuple(Tensor(a, _has_gradient(a)) for a in arrays)
        drops = self.work.drops(stage)
        with no_grad() if drops else self.work.saving():
            outputs = self._compute(stage, microbatch, inputs)
        self.kept[stage, microbatch] = _Kept(inputs, [] if drops else outputs)
        if stage + 1 < len(self.rank_of):
            self._leave(Kind.SEND_F, stage, microbatch, [one.data for one in outputs])

    def _compute(self, stage: int, microbatch: int, inputs: Values) -> list[Tensor]:
        made = self.work.forward(stage, microbatch, inputs)
        return list(made) if isinstance(made, tuple) else [made]

    def _backward(self, stage: int, microbatch: int) -> None:
        self._back(stage, microbatch, defer=False)

    def _input(self, stage: int, microbatch: int) -> None:
        self.kept[stage, microbatch].deferred = self._back(stage, microbatch, defer=True)

    def _weight(self, stage: int, microbatch: int) -> None:
        deferred = self.kept[stage, microbatch].deferred
        if deferred is None:  # no gradient went through this stage
            self.work.before_backward(stage, microbatch, ())
        else:
            self.work.before_backward(stage, microbatch, deferred.contributions())
            deferred.compute()

    def _back(self, stage: int, microbatch: int, defer: bool) -> Deferred | None:
        kept = self.kept[stage, microbatch]
        if not kept.outputs:
            kept.outputs = self._compute(stage, microbatch, kept.inputs)
        if stage + 1 == len(self.rank_of):
            (root,) = kept.outputs
            gradient = self.work.loss_gradient(microbatch, root)
        else:
            arrived = iter(self._arrived(Kind.RECV_B, stage, microbatch))
            pairs = [(one, next(arrived)) for one in kept.outputs if _has_gradient(one.data)]
            root, gradient = _root(pairs)
        kept.outputs = []
        if not defer:
            self.work.before_backward(stage, microbatch, contributions(root))
        deferred = backward(root, gradient, defer=defer) if root.ctx is not None else None
        if stage > 0:
            gradients = [_gradient(one) for one in kept.inputs if _has_gradient(one.data)]
            self._leave(Kind.SEND_B, stage, microbatch, gradients)
        kept.inputs = ()
        return deferred

    # --- messages -------------------------------------------------------------------------------

    def _leave(self, kind: Kind, stage: int, microbatch: int, arrays: list[Array]) -> None:
        """Hand arrays to the neighbour: to be sent, unless that is this rank too."""
        other = Action(stage, kind, microbatch).partner
        if self.rank_of[other.stage] == self.rank_of[stage]:
            self._coming[other.kind, other.stage, microbatch] = arrays
        else:
            self._going[kind, stage, microbatch] = arrays

    def _arrived(self, kind: Kind, stage: int, microbatch: int) -> list[Array]:
        coming = self._coming.pop((kind, stage, microbatch))
        return coming.wait() if isinstance(coming, Incoming) else coming

    def _send(self, kind: Kind, stage: int, microbatch: int) -> None:
        peer, key = self._way(kind, stage, microbatch)
        self.transfers.send(self._going.pop((kind, stage, microbatch)), peer, key)

    def _receive(self, kind: Kind, stage: int, microbatch: int) -> None:
        peer, key = self._way(kind, stage, microbatch)
        self._coming[kind, stage, microbatch] = self.transfers.receive(peer, key)

    def _way(self, kind: Kind, stage: int, microbatch: int) -> tuple[int, Any]:
        """The rank at the other end, and what the shapes depend on."""
        other = Action(stage, kind, microbatch).partner
        forward = kind in (Kind.SEND_F, Kind.RECV_F)
        key = forward, min(stage, other.stage), self.work.key(microbatch)
        return self.rank_of[other.stage], key


def _has_gradient(array: Array) -> bool:
    return array.dtype.kind not in "biu"


def _gradient(x: Tensor) -> Array:
    """The gradient of a stage's input; zero if nothing used it."""
    return xp(x.data).zeros_like(x.data) if x.gradient is None else x.gradient


def _root(pairs: Sequence[tuple[Tensor, Array]]) -> tuple[Tensor, Array]:
    """A tensor whose gradient is that of all outputs, and that gradient."""
    if len(pairs) == 1:
        return pairs[0]
    outputs, gradients = zip(*pairs, strict=True)
    return _together(*outputs, gradients=gradients), np.ones(())


@primitive
def _together(ctx: Context, *outputs: Array, gradients: Sequence[Array]) -> Array:
    """A number whose gradient with respect to each output is given."""
    ctx.attributes = gradients
    return np.ones(())


def _given(number: int) -> Callable[[Context, Array], Array]:
    return lambda ctx, g: ctx.attributes[number]


for _number in range(16):
    _together.adjoint(_given(_number))
