"""A whole model made tensor-, sequence- and context-parallel, by what it declares.

A model is written serially and declares how its layers are divided, by patterns of module names:

    class MyModel(Module):
        splits = {"embed": "vocab", "*.up": "column", "*.down": "row", "head": "output"}

| style | of | becomes |
|---|---|---|
| "column" | `Linear`, `Conv` | divided by outputs; what follows sees this rank's features |
| "row" | the same | divided by inputs, which a "column" layer has divided; the ranks add up |
| "qkv" | `Linear` | "column" of three projections side by side |
| "heads" | `PackedAttention`, or a module with `num_heads` or `heads` | this rank's heads |
| "vocab" | `Embedding` | rows of the table divided; here sequences begin |
| "positions" | `Embedding` | looks up the positions that this rank has |
| "output" | `Linear` | "column", as the loss takes it; here sequences end |
| "divided" | a module between "column" and "row" | its parameters and masks are divided likewise |
| "replicated" | the same | its parameters are whole, each rank uses them for its features |

A module takes the first pattern that fits. What no pattern names is on every rank, and computes
the same there; with sequence or context parallelism, each rank's positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.comm import Axis, Mesh
from hpcml.errors import UserError
from hpcml.nn import CrossEntropyLoss, Module, Sequential
from hpcml.parallel.data import broadcast_parameters
from hpcml.parallel.division import Division, mark_divided, refuse_divided
from hpcml.parallel.scores import Metric
from hpcml.parallel.tensor.convolutions import whole_buffer
from hpcml.parallel.tensor.guard import guard
from hpcml.parallel.tensor.kept import keep_parts
from hpcml.parallel.tensor.layers import OutputLinear
from hpcml.parallel.tensor.loss import VocabParallelCrossEntropyLoss
from hpcml.parallel.tensor.positions import Positions
from hpcml.parallel.tensor.replacing import replace
from hpcml.parallel.tensor.styles import MEGATRON, NAIVE, Style


class TensorDivision(Division):
    """A model whose layers and sequences ranks divide, and its loss with it."""

    def __init__(self, positions: Positions, loss: Any) -> None:
        super().__init__(loss)
        self.positions = positions
        self.outputs: list[OutputLinear] = []

    def begin_stage(self, inputs: Sequence[Tensor]) -> None:
        """Let positions be those of the inputs, whose first layer may be in another stage."""
        self.positions.features = None
        if self.positions.divided:
            self.positions.begin(inputs[0].shape[-1])

    def metrics(self, given: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """The same; raises UserError where they would not see all classes."""
        if given and any(not output.gathers for output in self.outputs):
            raise UserError(
                f"metrics={', '.join(given)} of outputs that tensor-parallel ranks divide: leave "
                'metrics out, or the style "output" in the model\'s splits'
            )
        return given

    def whole_buffers(self, model: Module) -> dict[str, Array]:
        """Copies of the model's buffers by name, of all channels. Collective."""
        return {
            f"{path}.{name}" if path else name: whole_buffer(module, name, self.positions.tp)
            for path, module in model.named_modules()
            for name in module._buffers
        }

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


def divide(
    model: Module,
    loss: Any,
    mesh: Mesh,
    *,
    how: str = "megatron",
    sequence_parallel: bool = False,
    overlap: bool | None = None,
    partition_activations: str = "no",
) -> TensorDivision:
    """Divide a model, in place, among the ranks of the mesh's axes "tp" and "cp".

    Collective; all ranks get the values of the first, where it has any.

    loss: called with the outputs and a target; an `nn.CrossEntropyLoss`, or a module of which
    `takes_divided_classes` is true, gets divided ones, others get all of them. The model's parts
    must have been named (`name_parts`). how: "megatron", or "naive" (see `NaiveLinear`).
    sequence_parallel, overlap: see `Positions`. partition_activations: "yes" if a rank keeps its
    part only of what all would save for backward, "cpu" in host memory
    (`hpcml.parallel.partition`). Raises UserError for what cannot be divided so.
    """
    refuse_divided(model)
    broadcast_parameters(model.parameters(), mesh["cp", "tp"])
    axis = mesh["tp"]
    positions = Positions(axis, mesh["cp"], sequence_parallel=sequence_parallel, overlap=overlap)
    division = TensorDivision(positions, loss)
    _check_options(axis, positions, how, partition_activations)
    if axis.size == 1 and not positions.divided:
        return division
    styles = _styles(model, axis if axis.size > 1 else positions.cp)
    _check_ends(model, styles, positions)
    makers = MEGATRON if how == "megatron" else NAIVE
    made = {id(m): _make(makers[style], m, positions) for m, style in styles}
    mark_divided(model)
    replace(model, made)
    division.outputs = [m for m in model.modules() if isinstance(m, OutputLinear)]
    if how == "megatron":
        guard(model, positions)
    if positions.cuts:
        for parameter in model.parameters():
            parameter.layout.setdefault(axis.name, "R")  # each rank's gradient is of its positions
    if partition_activations != "no" and axis.size > 1:
        keep_parts(model, axis, offload=partition_activations == "cpu")
    model.name_parts()
    _divide_loss(division)
    return division


def _check_options(axis: Axis, positions: Positions, how: str, partition: str) -> None:
    if how not in ("megatron", "naive"):
        raise UserError(f'tensor.split="{how}" is unknown: use "megatron" or "naive"')
    if partition not in ("no", "yes", "cpu"):
        raise UserError(f'tensor.partition_activations="{partition}": use "no", "yes" or "cpu"')
    if how == "naive" and positions.divided:
        what = "tensor.sequence_parallel" if positions.cuts else f"mesh.cp={positions.cp.size}"
        raise UserError(
            f'{what} with tensor.split="naive", whose ranks have whole sequences: use "megatron"'
        )


def _styles(model: Module, axis: Axis) -> list[tuple[Module, str]]:
    """The modules that are divided, each with its style."""
    kind = type(model).__name__
    splits: Mapping[str, str] = getattr(model, "splits", {})
    if not (splits and isinstance(splits, Mapping)):
        raise UserError(
            f"{kind} declares no splits, which mesh.{axis.name}={axis.size} needs: set "
            f'mesh.{axis.name}=1, or splits = {{"*.up": "column", "*.down": "row"}} in the model'
        )
    named = list(_all_names(model))
    for pattern, style in splits.items():
        if style not in MEGATRON:
            raise UserError(
                f'{kind}.splits: "{pattern}": "{style}" is unknown: use '
                f"{', '.join(list(MEGATRON)[:-1])} or {list(MEGATRON)[-1]}"
            )
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            names = ", ".join(name for name, module in named if name and not module._modules)
            raise UserError(
                f'{kind}.splits: no module is called "{pattern}": there are {names:.200}'
            )
    found: dict[int, tuple[Module, str]] = {}
    for name, module in named:
        fitting = [style for pattern, style in splits.items() if fnmatchcase(name, pattern)]
        for style in fitting[:1]:
            before = found.setdefault(id(module), (module, style))[1]
            if before != style:
                raise UserError(
                    f'{kind}.splits: {module.name}, which is {name} too, is "{before}" and '
                    f'"{style}": declare it once'
                )
    return list(found.values())


def _all_names(model: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Every name of every module below a model: one that is used twice has several."""
    for name, child in model._modules.items():
        yield f"{prefix}{name}", child
        yield from _all_names(child, f"{prefix}{name}.")


def _check_ends(model: Module, styles: list[tuple[Module, str]], positions: Positions) -> None:
    """What divides sequences needs to know where they begin and end."""
    missing = {"vocab", "output"} - {style for _, style in styles}
    if positions.divided and missing:
        key = "tensor.sequence_parallel=true" if positions.cuts else f"mesh.cp={positions.cp.size}"
        raise UserError(
            f"{key}: {type(model).__name__}.splits must say where sequences begin and end: declare "
            f"{' and '.join(sorted(missing))}, or leave it out"
        )


def _make(style: Style, module: Module, positions: Positions) -> Module:
    try:
        return style(module, positions)
    except UserError as error:
        if module.name in str(error):
            raise
        raise UserError(f"{module.name}: {error}") from None


def _divide_loss(division: TensorDivision) -> None:
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
            division.positions.tp, division.positions, classes=classes, ignore_index=m.ignore_index
        )
        for m in losses
    }
    replace(made, new)
    division.loss = made[0]
