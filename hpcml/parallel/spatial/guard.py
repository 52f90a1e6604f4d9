"""What modules of a divided model get and give: blocks of images, or what is whole."""

from __future__ import annotations

from typing import Any

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import LayerNorm, Module
from hpcml.nn.module import where
from hpcml.parallel.spatial.cuts import of_space, shown
from hpcml.parallel.spatial.grid import Grid


def guard(model: Module, grid: Grid, kinds: tuple[type[Module], ...], known: set[int]) -> None:
    """Let the model know the blocks that it gets, and refuse what cannot leave it.

    kinds: of layers that work on what lies around a place, and see to it that it is as they want;
    where they are not known, by id, as divided or declared, they refuse blocks.
    """
    for module in model.modules():
        if isinstance(module, kinds) and id(module) not in known:
            module.register_forward_pre_hook(_Whole(grid))
    model.register_forward_pre_hook(_Begin(grid))
    model.register_forward_hook(_End(grid))


def has_block(grid: Grid, module: Module, x: Tensor) -> bool:
    """Whether x is this rank's block (N, C, *S) of images, and not whole.

    Raises UserError for blocks with their dimensions in another order, for one after the end of
    the region, and, before that, for what nothing is known of.
    """
    cut = grid.cuts.of(x.data)
    if cut is None and grid.inside:
        raise UserError(
            f"{where(module)} gets an array of {x.ndim} dimensions of which is not known what "
            f"{grid.axis.name} divides: make it by operations of tensors, from what the model "
            'gets, or in a module that spatial declares "pointwise"'
        )
    if cut is None or not of_space(cut):
        return False
    if cut != grid.space:
        raise UserError(
            f"{where(module)} gets {shown(x.shape, cut)}, where {grid.axis.name} divides "
            "images: it takes blocks (N, C, ...) with their dimensions in order"
        )
    return True


class _Whole:
    """A hook before a layer that would take a block for the whole."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, module: Module, inputs: tuple[Any, ...]) -> None:
        last = len(module.normalized_shape) if isinstance(module, LayerNorm) else 0
        for one in inputs:
            cut = self.grid.cuts.of(one.data) if isinstance(one, Tensor) else None
            if cut is not None and of_space(cut[-last:]):  # of layer norm what it joins
                raise UserError(
                    f"{where(module)} gets {shown(one.shape, cut)}, blocks of images that "
                    f"{self.grid.axis.name} divides, and would take them for the whole: declare "
                    f'where the region ends, spatial = {{"{module.name}": "gather"}} (or '
                    '"samples") in the model, or "pointwise" if it computes each pixel by itself'
                )


class _Begin:
    """A hook before the model."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, model: Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not isinstance(inputs[0], Tensor):
            raise UserError(
                f"{type(model).__name__} got no tensor first, which {self.grid.axis.name} would "
                "divide: give it images (N, C, ...)"
            )
        self.grid.enter(inputs[0], inputs[1:])


class _End:
    """A hook after the model: what leaves it is of pixels, or the region has ended."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, model: Module, inputs: Any, out: Any) -> Any:
        grid = self.grid
        for one in _each(out):
            if not isinstance(one, Tensor):
                continue
            cut = grid.cuts.of(one.data)
            if cut != grid.space if grid.inside else of_space(cut):
                found = shown(one.shape, cut) if cut and of_space(cut) else "what is no block"
                raise UserError(
                    f"{type(model).__name__} ends with {found} where {grid.axis.name} divides "
                    "images: give (N, C, ...) for each pixel, or declare where the region ends, "
                    'spatial = {"name of a layer": "gather"} (or "samples")'
                )
        return grid.joined(model, out) if grid.gathers else None


def _each(out: Any) -> list[Any]:
    """The parts of what a model returns."""
    if isinstance(out, dict):
        out = list(out.values())
    return list(out) if isinstance(out, tuple | list) else [out]
