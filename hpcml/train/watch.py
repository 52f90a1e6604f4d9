"""What goes in and out of every module in one pass, forward and backward, in order of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array, xp
from hpcml.nn import Module
from hpcml.nn.module import boundary
from hpcml.nn.part import Range
from hpcml.parallel import Step
from hpcml.parallel.division import Division
from hpcml.parallel.spatial import SpatialDivision
from hpcml.parallel.tensor import TensorDivision

MODEL, LOSS = "the model", "the loss"
"""What the model and the loss as a whole are called."""


class Event(NamedTuple):
    """A tensor that went in or out of a module, or its gradient that came back."""

    stage: str
    """Such as "forward" or "backward"."""
    layer: str
    """Qualified name of the module."""
    what: str
    """Such as "output" or "gradient of the input"."""
    call: int = 0
    """How often the module was called before in this pass."""


class Place(NamedTuple):
    """What this rank had of features and positions when a tensor was there."""

    features: tuple[int, tuple[Range, ...]] = (0, ())
    length: int = 0
    own: tuple[Range, ...] = ()
    context: tuple[Range, ...] = ()
    samples: Range | None = None
    """Where ranks that divide images divide samples."""
    share: float = 1.0
    """Of a gradient, where they all compute the same and each has its share."""
    adds: bool = False
    """Of a gradient, whether each has what its own part of the images adds to it: of what all have
    whole where they divide images or samples."""

    @staticmethod
    def of(division: Division, array: Array) -> Place:
        """As the layers of a divided model have left it, and an array in it."""
        if isinstance(division, SpatialDivision):
            grid = division.grid
            cut = grid.cuts.of(array) or (0,)
            adds = all(one is None for one in cut) and (grid.inside or grid.own_samples is not None)
            return Place(samples=grid.own_samples, share=grid.share, adds=adds)
        if not isinstance(division, TensorDivision):
            return Place()
        positions = division.positions
        features = positions.features or (0, ())
        if not positions.divided:
            return Place(features)
        return Place(features, positions.length, positions.own, positions.context)


@dataclass
class Seen:
    """What was there: a copy, and whose code made it."""

    values: Array
    maker: str
    """The module that computed it: of an output itself, of an input the one that called."""
    place: Place


@dataclass
class _Call:
    layer: str
    number: int


@dataclass
class Watch:
    """Listens to pass `number` (from 0; None: to none) of a step through its model and loss."""

    step: Step
    number: int | None
    seen: dict[Event, Seen] = field(default_factory=dict)
    """In the order in which it was there."""

    def __post_init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._running: list[_Call] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, note what happens."""
        handles = []
        for name, module in named_modules(self.step):
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., Any]:
        def hook(module: Module, args: tuple[Any, ...]) -> Any:
            if self.number is None or self.step.current != self.number:
                return None
            self._running.append(_Call(name, self._calls[name]))
            self._calls[name] += 1
            return self._noted(args, "input")

        return hook

    def _leave(self, module: Module, args: Any, out: Any) -> Any:
        if self.number is None or self.step.current != self.number:
            return None
        changed = self._noted(out, "output")
        self._running.pop()
        return changed

    def _noted(self, value: Any, what: str) -> Any:
        """The same, with its tensors noted, and to be noted again when their gradients come."""
        call = self._running[-1]
        outside = self._running[-2].layer if len(self._running) > 1 else call.layer
        # What came in, a caller made; the gradient of what went out, too: by using it.
        maker, of_gradient = (outside, call.layer) if what == "input" else (call.layer, outside)
        count = 0

        def see(stage: str, name: str, array: Array, maker: str, place: Place) -> None:
            self.seen[Event(stage, call.layer, name, call.number)] = Seen(
                _copy(array), maker, place
            )

        def note(tensor: Tensor) -> Tensor:
            nonlocal count
            name = f"{what} {count}" if count else what
            count += 1
            place = Place.of(self.step.division, tensor.data)
            see("forward", name, tensor.data, maker, place)
            if not tensor.requires_grad or tensor.is_parameter:
                return tensor
            gradient = f"gradient of the {name}"
            return boundary(
                tensor, on_gradient=lambda g: see("backward", gradient, g, of_gradient, place)
            )

        return _each_tensor(value, note)


def add_up(seen: dict[Event, Seen], division: Division) -> None:
    """Let gradients of what all ranks have whole be the sums of what each adds. Collective."""
    if not isinstance(division, SpatialDivision):
        return
    mine = {
        event: one.values
        for event, one in seen.items()
        if event.stage == "backward" and one.place.adds
    }
    every = division.grid.axis.allgather_object(mine)
    for event in mine:
        seen[event].values = sum(of_rank[event] for of_rank in every if event in of_rank)


def named_modules(step: Step) -> Iterator[tuple[str, Module]]:
    """The modules of a step's model and loss, by qualified names."""
    for name, module in step.model.named_modules():
        yield name or MODEL, module
    if isinstance(step.loss, Module):
        yield from step.loss.named_modules(prefix=LOSS)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value, or tuples, lists and dicts of values, with `change(tensor)` for each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_each_tensor(one, change) for one in value)
    if type(value) is dict:
        return {name: _each_tensor(one, change) for name, one in value.items()}
    return value


def _copy(array: Array) -> Array:
    """A copy on the host."""
    return np.array(array) if xp(array) is np else array.get()
