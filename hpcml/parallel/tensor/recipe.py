"""A whole model made tensor-, sequence- and context-parallel, by what it declares.

A model is written serially and declares how its layers are divided, by patterns of module names:

    class MyModel(Module):
        splits = {"embed": "vocab", "*.up": "column", "*.down": "row", "head": "output"}

| style | of | becomes |
|---|---|---|
| "column" | `Linear` | divided by outputs; what follows sees this rank's features |
| "row" | `Linear` | divided by inputs, which a "column" layer has divided; the ranks add up |
| "qkv" | `Linear` | "column" of three projections side by side |
| "heads" | `PackedAttention`, or a module with `num_heads` or `heads` | this rank's heads |
| "vocab" | `Embedding` | rows of the table divided; here sequences begin |
| "positions" | `Embedding` | looks up the positions that this rank has |
| "output" | `Linear` | "column", as the loss takes it; here sequences end |
| "divided" | a module between "column" and "row" | its parameters and masks are divided likewise |

A module takes the first pattern that fits. What no pattern names is on every rank, and computes
the same there; with sequence or context parallelism, each rank's positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hpcml.comm import Axis, Mesh
from hpcml.errors import UserError
from hpcml.nn import (
    CrossEntropyLoss,
    Dropout,
    Embedding,
    Linear,
    Module,
    PackedAttention,
    Sequential,
)
from hpcml.nn.part import blocks
from hpcml.parallel.tensor.attention import ParallelAttention, share_heads
from hpcml.parallel.tensor.dropout import DividedDropout, PositionsDropout
from hpcml.parallel.tensor.layers import ColumnParallelLinear, OutputLinear, RowParallelLinear
from hpcml.parallel.tensor.loss import VocabParallelCrossEntropyLoss
from hpcml.parallel.tensor.parts import block, divide_parameter
from hpcml.parallel.tensor.positions import Positions
from hpcml.parallel.tensor.vocab import PositionEmbedding, VocabParallelEmbedding


@dataclass
class Division:
    """How a model is divided among the ranks of a mesh, and its loss with it."""

    axis: Axis
    """The tensor-parallel ranks."""
    positions: Positions
    loss: Any
    outputs: list[OutputLinear] = field(default_factory=list)

    @contextmanager
    def whole_outputs(self) -> Iterator[None]:
        """Within, the model gives all its outputs to every rank. Collective."""
        before = [(output, output.gathers) for output in self.outputs]
        for output in self.outputs:
            output.gathers = True
        try:
            yield
        finally:
            for output, gathers in before:
                output.gathers = gathers


def divide(model: Module, loss: Any, mesh: Mesh, *, sequence_parallel: bool = False) -> Division:
    """Divide a model, in place, among the ranks of the mesh's axes "tp" and "cp".

    loss: called with the outputs and a target; an `nn.CrossEntropyLoss`, or a module of which
    `takes_divided_classes` is true, gets divided ones, others get all of them. The model's parts
    must have been named (`name_parts`). Raises UserError for what cannot be divided so.
    """
    if any(parameter.part for parameter in model.parameters()):
        raise UserError(
            f"this {type(model).__name__} is divided among tensor-parallel ranks already: make it "
            "anew, and load its values (load_state_dict of what `gathered` gave)"
        )
    axis = mesh["tp"]
    positions = Positions(axis, mesh["cp"], sequence_parallel=sequence_parallel)
    division = Division(axis, positions, loss)
    if axis.size == 1 and not positions.divided:
        return division
    styles = _styles(model, axis if axis.size > 1 else positions.cp)
    _check_ends(model, styles, positions)
    _replace(model, {id(m): _STYLES[style](m, division) for m, style in styles})
    if positions.divided:
        dropouts = [m for m in model.modules() if type(m) is Dropout]
        _replace(model, {id(m): PositionsDropout(m, positions) for m in dropouts})
    if positions.cuts:
        for parameter in model.parameters():
            parameter.layout.setdefault(axis.name, "R")  # each rank's gradient is of its positions
    model.name_parts()
    _divide_loss(division)
    return division


def _styles(model: Module, axis: Axis) -> list[tuple[Module, str]]:
    """The modules that are divided, each with its style."""
    kind = type(model).__name__
    splits: Mapping[str, str] = getattr(model, "splits", {})
    if not splits:
        raise UserError(
            f"{kind} declares no splits, which mesh.{axis.name}={axis.size} needs: set "
            f'mesh.{axis.name}=1, or splits = {{"*.up": "column", "*.down": "row"}} in the model'
        )
    named = list(model.named_modules())
    for pattern, style in splits.items():
        if style not in _STYLES:
            raise UserError(
                f'{kind}.splits: "{pattern}": "{style}" is unknown: use one of {", ".join(_STYLES)}'
            )
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            names = ", ".join(name for name, module in named if name and not module._modules)
            raise UserError(
                f'{kind}.splits: no module is called "{pattern}": there are {names:.200}'
            )
    found: list[tuple[Module, str]] = []
    for name, module in named:
        fitting = [style for pattern, style in splits.items() if fnmatchcase(name, pattern)]
        found += [(module, style) for style in fitting[:1]]
    return found


def _check_ends(model: Module, styles: list[tuple[Module, str]], positions: Positions) -> None:
    """What divides sequences needs to know where they begin and end."""
    missing = {"vocab", "output"} - {style for _, style in styles}
    if positions.divided and missing:
        key = "tensor.sequence_parallel=true" if positions.cuts else f"mesh.cp={positions.cp.size}"
        raise UserError(
            f"{key}: {type(model).__name__}.splits must say where sequences begin and end: declare "
            f"{' and '.join(sorted(missing))}, or leave it out"
        )


def _replace(model: Module, new: Mapping[int, Module]) -> None:
    """Put new modules in the place of old ones, wherever these are used."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            made = new.get(id(child))
            if made is None or made is child:
                continue
            made.training = child.training
            for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks",
                          "_backward_hooks"):  # fmt: skip
                setattr(made, hooks, getattr(child, hooks))
            setattr(parent, name, made)


def _divide_loss(division: Division) -> None:
    """Let the loss take divided outputs, or let the outputs be gathered for it."""
    outputs, loss = division.outputs, division.loss
    takes = type(loss) is CrossEntropyLoss or getattr(loss, "takes_divided_classes", False)
    made = Sequential(*([copy.deepcopy(loss)] if takes else []))  # the caller's is for serial use
    losses = [m for m in made.modules() if type(m) is CrossEntropyLoss]
    if len(outputs) != 1 or not losses or any(m.reduction != "mean" for m in losses):
        for output in outputs:
            output.gathers = True
        return
    classes = outputs[0].out_features
    new = {
        id(m): VocabParallelCrossEntropyLoss(
            division.axis, division.positions, classes=classes, ignore_index=m.ignore_index
        )
        for m in losses
    }
    _replace(made, new)
    division.loss = made[0]


# --- styles -------------------------------------------------------------------------------------


def _take(module: Module, style: str, kind: type[Module]) -> Any:
    if type(module).forward is not kind.forward:
        raise UserError(
            f'splits: "{style}" takes an nn.{kind.__name__}, not {module.name}, which is a '
            f"{type(module).__name__}"
        )
    return module


def _linear(style: str, make: Callable[..., Module], **options: Any) -> Callable[..., Module]:
    def made(module: Module, division: Division) -> Module:
        linear = _take(module, style, Linear)
        try:
            return make(linear, division.axis, positions=division.positions, **options)
        except UserError as error:
            raise UserError(f"{module.name}: {error}") from None

    return made


def _output(module: Module, division: Division) -> Module:
    made = _linear("output", OutputLinear)(module, division)
    assert isinstance(made, OutputLinear)
    division.outputs.append(made)
    return made


def _vocab(module: Module, division: Division) -> Module:
    embedding = _take(module, "vocab", Embedding)
    return VocabParallelEmbedding(embedding, division.axis, positions=division.positions)


def _positions(module: Module, division: Division) -> Module:
    embedding = _take(module, "positions", Embedding)
    return (
        PositionEmbedding(embedding, division.positions) if division.positions.divided else module
    )


def _heads(module: Module, division: Division) -> Module:
    if isinstance(module, PackedAttention):
        return ParallelAttention(module, division.axis, division.positions)
    name = next((name for name in ("num_heads", "heads") if hasattr(module, name)), None)
    if name is None:
        raise UserError(
            f'splits: "heads" takes an nn.PackedAttention, or a module with an attribute num_heads '
            f"or heads, not {module.name}, a {type(module).__name__}"
        )
    cp = division.positions.cp.size
    if cp > 1:
        raise UserError(
            f"mesh.cp={cp} needs nn.PackedAttention, which {module.name}, a "
            f"{type(module).__name__}, is not: set mesh.cp=1"
        )
    setattr(module, name, share_heads(getattr(module, name), division.axis)[0])
    return module


def _divided(module: Module, division: Division) -> Module:
    axis = division.axis
    for parameter in module.parameters():
        width = parameter.whole_shape[-1]
        block(f"{parameter.name}: features", width, axis)
        cuts = [(ranges,) for ranges in blocks(width, axis.size)]
        divide_parameter(parameter, len(parameter.whole_shape) - 1, cuts, axis)
    return DividedDropout(module, division.positions) if type(module) is Dropout else module


_STYLES: dict[str, Callable[[Module, Division], Module]] = {
    "column": _linear("column", ColumnParallelLinear),
    "row": _linear("row", RowParallelLinear),
    "qkv": _linear("qkv", ColumnParallelLinear, packed=3),
    "heads": _heads,
    "vocab": _vocab,
    "positions": _positions,
    "output": _output,
    "divided": _divided,
}
