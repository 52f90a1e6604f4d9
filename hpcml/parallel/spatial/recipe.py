"""A whole model made spatially parallel, by what its layers are and what it declares.

Convolutions, pools, batch normalisation, resizing and dropout need no declaration. A model says by
patterns of module names where the region ends in which ranks have blocks of the images, and which
layers of its own compute each pixel by itself:

    class MyModel(Module):
        spatial = {"scale": "pointwise", "avgpool": "gather"}

| style | the module |
|---|---|
| "gather" | gets whole images of all samples: from here on ranks compute the same |
| "samples" | gets whole images of this rank's samples: from here on ranks divide these |
| "pointwise" | takes blocks as it would take the whole |

Without an end the outputs are of pixels, and the loss is of each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hpcml import nn
from hpcml.autograd.mode import watching
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.parallel.batch import samples_of
from hpcml.parallel.batchnorm import NORMS, Together, Turn
from hpcml.parallel.data import broadcast_parameters
from hpcml.parallel.division import Division, mark_divided, refuse_divided
from hpcml.parallel.scores import Metric
from hpcml.parallel.spatial import ends, layers
from hpcml.parallel.spatial.convolutions import convolution, transposed_convolution
from hpcml.parallel.spatial.cuts import of_space
from hpcml.parallel.spatial.grid import NAMES, SAMPLES, Grid, Sizes
from hpcml.parallel.spatial.guard import guard, has_block
from hpcml.parallel.spatial.loss import SpatialLoss, measured
from hpcml.parallel.spatial.operations import watch
from hpcml.parallel.tensor.styles import is_plain

DIVIDED: dict[type[Module], Callable[[Any, Grid], layers.Forward]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        transposed_convolution,
    ),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), layers.max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), layers.average_pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), layers.adaptive_pool
    ),
    nn.Upsample: layers.upsample,
    nn.PixelShuffle: layers.pixel_shuffle,
    nn.Dropout: layers.dropout,
}
"""Layers, and the forward that each has on blocks."""


class SpatialDivision(Division):
    """A model of which each rank computes blocks of the images, and its loss with it."""

    def __init__(self, grid: Grid, loss: Any, ends: bool) -> None:
        super().__init__(SpatialLoss(loss, grid))
        self.grid = grid
        self._targets_cut = not ends

    def fields(self, batch: Any, samples: slice) -> list[Any]:
        """This rank's blocks of some samples of a batch (*inputs, target).

        Images (N, C, *S) are cut; where outputs are of pixels, targets (N, *S') or (N, C, *S') too.
        """
        whole = getattr(batch, "image_size", None)
        if whole is not None:
            self.grid.begin(whole)
            fields = list(batch.part(samples, self.grid.block(whole)))
            self.grid.begin(whole, [True] * (len(fields) - 1))
            if self._targets_cut:
                self._check_target(np.shape(fields[-1]))
            elif np.ndim(fields[-1]) > 1:  # of pixels, cut like these: a loss wants them all
                fields[-1] = batch.targets(samples)
            return fields
        *inputs, target = samples_of(batch, samples)
        inputs = self.inputs(inputs)
        if self._targets_cut:
            sizes = self._check_target(np.shape(target))
            self.grid.require("the target", "targets", sizes)
            target = self.grid.cut(target, sizes)
        return [*inputs, target]

    def _check_target(self, shape: Sizes) -> Sizes:
        """Sizes of targets of pixels; raises UserError for others."""
        dims = len(self.grid.whole)
        if len(shape) <= dims:
            raise UserError(
                f"targets {shape} for outputs of pixels: give (N, *S) or (N, C, *S), or declare "
                'where the region ends, spatial = {"name of a layer": "gather"}'
            )
        return shape[-dims:]

    def inputs(self, fields: Sequence[Any]) -> list[Any]:
        """This rank's blocks of what a model takes; the first are images, which begin a pass."""
        whole = np.shape(fields[0])[2:]
        images = [np.shape(one)[2:] == whole for one in fields]
        self.grid.begin(whole, images)
        pairs = zip(fields, images, strict=True)
        return [self.grid.cut(one, whole) if is_image else one for one, is_image in pairs]

    def metrics(self, given: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Metrics of outputs and targets, over all ranks that divide these."""
        return {name: measured(metric, self.grid) for name, metric in given.items()}

    @contextmanager
    def whole_outputs(self) -> Iterator[None]:
        """Within, the model gives all its outputs to every rank. Collective."""
        self.grid.gathers = True
        try:
            yield
        finally:
            self.grid.gathers = False


def divide(
    model: Module, loss: Any, mesh: Mesh, *, overlap: bool | None = None, turn: Turn | None = None,
    end: str = "", style: str = "gather",
) -> SpatialDivision:  # fmt: skip
    """Divide a model, in place, among the ranks of "sp_d", "sp_h" and "sp_w". Collective.

    All ranks get the values of the first, where it has any. loss: called with outputs and target;
    see `SpatialLoss`. overlap: compute while halos travel (`overlap.py`); None: where that gains
    (`Axis.overlaps`). turn: where batch norm takes statistics over data-parallel ranks too. end:
    where the region ends at the latest, a pattern of module names beside those that the model
    declares, and in which style. The model's parts must have been named (`name_parts`). Raises
    UserError for what cannot be divided so.
    """
    _check(model, loss, mesh)
    broadcast_parameters(model.parameters(), mesh[NAMES])
    grid = Grid(mesh, overlap)
    styles = _styles(model)
    if end:
        styles += _fitting(model, f'spatial.end="{end}"', end, style, tuple(ends.STYLES))
    known = {id(module) for module, _ in styles}
    mark_divided(model)
    for module in list(model.modules()):
        make = next((f for kind, f in DIVIDED.items() if is_plain(module, kind)), None)
        if make is not None:
            known.add(id(module))
            _divided(module, grid, make(module, grid))
        if any(is_plain(module, kind) for kind in NORMS):
            known.add(id(module))
            _normalised(module, grid, turn)
    for module, style in styles:
        if style in ends.STYLES:
            _set(module, ends.end(module, grid, style))
    for parameter in model.parameters():
        parameter.layout.update({name: "R" for name in NAMES if mesh[name].size > 1})
    guard(model, grid, (*DIVIDED, *NORMS, nn.LayerNorm), known)
    watch(model, grid, {id(module) for module, style in styles if style not in ends.STYLES})
    return SpatialDivision(grid, loss, any(style in ends.STYLES for _, style in styles))


def _check(model: Module, loss: Any, mesh: Mesh) -> None:
    ours = mesh[NAMES]
    for name in ("pp", "cp", "tp"):
        size = mesh[name].size
        if size > 1:
            raise UserError(
                f"mesh.{name}={size} with {ours.name}={ours.size}: ranks that divide images divide "
                f"nothing else of a model: set mesh.{name}=1"
            )
    if loss is None:
        raise UserError(
            f"{ours.name}={ours.size} needs a loss of its own, called with outputs and target, "
            "which ranks divide: pass loss="
        )
    refuse_divided(model)


def _styles(model: Module) -> list[tuple[Module, str]]:
    """The modules that the model declares, each with its style."""
    kind = type(model).__name__
    declared: Mapping[str, str] = getattr(model, "spatial", {})
    if not isinstance(declared, Mapping):
        raise UserError(f'{kind}.spatial={declared}: declare a mapping, such as {{"fc": "gather"}}')
    found = []
    for pattern, style in declared.items():
        found += _fitting(model, f"{kind}.spatial", pattern, style, ("pointwise", *ends.STYLES))
    return found


def _fitting(
    model: Module, place: str, pattern: str, style: str, known: Sequence[str]
) -> list[tuple[Module, str]]:
    """The modules of a pattern with their style, of those that are known; place: who says so."""
    if style not in known:
        raise UserError(
            f'{place}: "{pattern}": "{style}" is unknown: use {", ".join(known[:-1])} or '
            f"{known[-1]}"
        )
    named = [(name, module) for name, module in model.named_modules() if name]
    found = [(module, style) for name, module in named if fnmatchcase(name, pattern)]
    if not found:
        names = ", ".join(name for name, _ in named)
        raise UserError(f'{place}: no module is called "{pattern}": there are {names:.200}')
    return found


def _divided(module: Any, grid: Grid, forward: layers.Forward) -> None:
    """Let a layer compute blocks where it gets them."""
    serial = ends.numbered(module, grid) if is_plain(module, nn.Dropout) else module.forward

    def choose(x: Any) -> Any:
        if not has_block(grid, module, x):
            return serial(x)
        if not grid.inside:
            raise ends.too_late(module, grid)
        with watching(None):
            out = forward(x)
        grid.cuts.note(out.data, grid.space)
        return out

    _set(module, choose)


def _normalised(module: Any, grid: Grid, turn: Turn | None) -> None:
    """Let statistics be those of all ranks where each has a part of what they are of."""
    serial, mesh = module.forward, grid.mesh
    of_parts = Together(grid.axis if turn is None else mesh["dp", *NAMES], turn)
    of_whole = None if turn is None else Together(mesh["dp"], turn)

    def forward(input: Any) -> Any:
        cut = grid.cuts.of(input.data)
        if cut is None or (of_space(cut) and cut[1] is not None):
            has_block(grid, module, input)  # which may not be
        module.across = of_parts if of_space(cut) or grid.state == SAMPLES else of_whole
        with watching(None):
            out = serial(input)
        if cut is not None:
            grid.cuts.note(out.data, cut)
        return out

    _set(module, forward)


def _set(module: Any, forward: Callable[..., Any]) -> None:
    module.forward = forward
