"""What the ranks find that compare a parallel run with the serial one: a report of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcml.parallel import Step
from hpcml.train.cause import Cause, explain
from hpcml.train.compare import Item, Row, marks, rows
from hpcml.train.watch import MODEL, Event, named_modules

# Relative to the largest value. What two layouts of a healthy model differ by is rounding, about
# 1e-15, 1e-6 and 1e-2 after a few layers; faults are of the size of the values.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
# Relative to the largest update. Adam divides a gradient by its own size, so that where it is
# nothing but rounding even the sign is chance: in fp64 its eps hides that, else only what is out of
# all proportion can be told.
UPDATE_TOLERANCE = {"fp64": 1e-4, "fp32": 2.5, "bf16": 2.5, "fp16": 2.5}

STAGES = ("first values", "forward", "backward", "gradient", "loss", "norm", "update")
"""Of a step, in the order in which they are compared."""
OF_MODULES = ("forward", "backward", "gradient")
"""Stages of which each module has its own."""


@dataclass
class Layer:
    """A module, and how far its tensors are off, relative to the largest serial values."""

    name: str
    kind: str
    forward: float | None = None
    backward: float | None = None
    gradient: float | None = None
    """Of its own parameters."""
    agrees: bool = True


@dataclass
class Stage:
    """First values, the loss, the norm or the update, and how far off they are."""

    off: float = 0.0
    agrees: bool = True


@dataclass
class Divergence:
    """Where the parallel run first differs from the serial one."""

    step: int
    """Counted from 1."""
    stage: str
    what: str
    module: str
    """Whose tensor it is."""
    layer: str
    """What computed it: that module, or the one that called it."""
    kind: str
    """Of the layer."""
    off: float
    """Relative to the largest serial value."""
    ranks: list[int]
    cause: str
    axes: list[str]
    ratio: float | None


@dataclass
class Report:
    """What a check found in all its steps, or until the runs parted."""

    mesh: dict[str, int]
    precision: str
    steps: int = 0
    layers: list[Layer] = field(default_factory=list)
    """In the order in which they were done."""
    others: dict[str, Stage] = field(default_factory=dict)
    """What is not of a module, by its stage."""
    first: Divergence | None = None

    @property
    def agrees(self) -> bool:
        """Whether the runs are the same."""
        return self.first is None

    @property
    def tolerance(self) -> float:
        """How far off counts as the same."""
        return TOLERANCE[self.precision]

    def add(self, stage: str, items: Mapping[Event, Item], step: Step) -> None:
        """Add what the ranks say of a stage of the parallel `step`. Collective."""
        types = {name: type(module).__name__ for name, module in named_modules(step)}
        tolerance = UPDATE_TOLERANCE[self.precision] if stage == "update" else self.tolerance
        layers = {layer.name: layer for layer in self.layers}
        table = rows(marks(items, step.mesh), step.mesh, tolerance)
        for event in table:  # a module is done when its output is there
            if stage == "gradient" or event.what.startswith("output"):
                layers.setdefault(event.layer, Layer(event.layer, types[event.layer]))
        for event, row in table.items():
            differs = row.off > tolerance or bool(row.apart)
            self._note(stage, layers.get(event.layer), row.off, differs)
            if differs and self.first is None:
                cause = explain(event, items.get(event), row, step.mesh, tolerance)
                self.first = _divergence(self.steps, event, types, row, cause, tolerance)
        self.layers = list(layers.values())

    def _note(self, stage: str, layer: Layer | None, off: float, differs: bool) -> None:
        if stage not in OF_MODULES:
            other = self.others.setdefault(stage, Stage())
            other.off, other.agrees = max(other.off, off), other.agrees and not differs
        elif layer is not None:
            setattr(layer, stage, max(getattr(layer, stage) or 0.0, off))
            layer.agrees = layer.agrees and not differs


def _divergence(
    step: int, event: Event, types: Mapping[str, str], row: Row, cause: Cause, tolerance: float
) -> Divergence:
    marks = {rank: mark for rank, mark in enumerate(row.marks) if mark}
    maker = next(iter(marks.values())).maker
    what, of = event.what, event.layer
    if event.stage in ("first values", "gradient", "update"):
        what, of = event.stage, what if of == MODEL else f"{of}.{what}"
    return Divergence(
        step=step, stage=event.stage, what=f"{what} of {of}", module=event.layer, layer=maker,
        kind=types[maker], off=row.off,
        ranks=[rank for rank, mark in marks.items() if row.apart or mark.off > tolerance],
        cause=cause.text, axes=cause.axes, ratio=cause.ratio,
    )  # fmt: skip
