"""What a spatially divided model refuses, by the name of the layer that would get it wrong."""

from __future__ import annotations

from typing import Any

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import GELU, LayerNorm, Linear, Module, ReLU, Sequential, Sigmoid, Tanh
from hpcml.parallel.spatial.grid import Grid, where
from hpcml.parallel.tensor.styles import is_plain

POINTWISE: tuple[type[Module], ...] = (ReLU, GELU, Sigmoid, Tanh, Sequential)
"""What computes every place of an image by itself."""


def guard(model: Module, grid: Grid, known: set[int]) -> None:
    """Let what would work on blocks as if they were whole refuse them.

    known: modules, by id, that are divided or declared to take blocks.
    """
    for module in model.modules():
        if id(module) in known or any(is_plain(module, kind) for kind in POINTWISE):
            continue
        if is_plain(module, Linear) or is_plain(module, LayerNorm):
            module.register_forward_pre_hook(_LastDim(grid))
        elif not module._modules:
            module.register_forward_pre_hook(_Whole(grid))
    model.register_forward_pre_hook(_Begin(grid))
    model.register_forward_hook(_End(grid))


def _refusal(module: Module, grid: Grid, found: Any) -> UserError:
    name = module.name or "layer"
    return UserError(
        f"{where(module)} gets {found}, of images that {grid.axis.name} divides, and would take it "
        f'for the whole: declare where the region ends, spatial = {{"{name}": "gather"}} (or '
        '"samples") in the model, or "pointwise" if it computes each pixel by itself'
    )


class _Whole:
    """A hook before a module of which nothing is known."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, module: Module, inputs: tuple[Any, ...]) -> None:
        if self.grid.inside:
            shapes = [one.shape for one in inputs if isinstance(one, Tensor)]
            raise _refusal(module, self.grid, shapes[0] if shapes else "a block")


class _LastDim:
    """A hook before a module that joins the last dimension: the channels of (N, *S, C)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if not self.grid.inside:
            return
        joined = 1 if isinstance(module, Linear) else len(module.normalized_shape)
        if inputs[0].ndim != len(self.grid.whole) + 2 or joined > 1:
            raise _refusal(module, self.grid, inputs[0].shape)


class _Begin:
    """A hook before the model."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, model: Module, inputs: tuple[Any, ...]) -> None:
        images = next((one for one in inputs if isinstance(one, Tensor)), None)
        if images is None:
            raise UserError(
                f"{type(model).__name__} got no tensor, which {self.grid.axis.name} would divide"
            )
        self.grid.enter(images)


class _End:
    """A hook after the model: what leaves it is of pixels, or the region has ended."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, model: Module, inputs: Any, out: Any) -> Any:
        grid = self.grid
        for one in _each(out) if grid.inside else ():
            if isinstance(one, Tensor) and one.ndim != len(grid.whole) + 2:
                raise UserError(
                    f"{type(model).__name__} ends with {one.shape} where {grid.axis.name} divides "
                    "images: give (N, C, ...) for each pixel, or declare where the region ends, "
                    'spatial = {"name of a layer": "gather"} (or "samples")'
                )
        return grid.joined(model, out) if grid.gathers else None


def _each(out: Any) -> list[Any]:
    """The parts of what a model returns."""
    if isinstance(out, dict):
        out = list(out.values())
    return list(out) if isinstance(out, tuple | list) else [out]
