"""Operations in the forward of a user's module that would take a block for the whole image.

Layers are divided; what a module's own forward calls between them is not known beforehand. While
ranks have blocks, each use of a primitive there is looked at: what computes every place by itself
may, what joins places is refused, by the name of the module and of the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml.autograd.mode import watching
from hpcml.backend import Array
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.parallel.spatial.grid import Grid, where

_BY_PLACE = frozenset((
    "add", "sub", "mul", "div", "power", "neg", "exp", "log", "sqrt", "absolute", "tanh", "sigmoid",
    "relu", "gelu", "maximum", "minimum", "where", "cast", "permute", "expand", "boundary",
))  # fmt: skip
"""Primitives that compute every place by itself, or only say in another order what lies where."""
_ALONG = frozenset(("sum", "mean", "amax", "amin", "softmax", "log_softmax"))
"""Those that join what lies along `dim`."""
_MOVES = frozenset(("reshape", "getitem", "cat", "stack", "pad"))
"""Those that may leave the places as they are."""


def watch(model: Module, grid: Grid, known: set[int]) -> None:
    """Let the model refuse such operations while it runs; known: layers that may do anything."""
    found = _Operations(grid)
    for module in model.modules():
        trusted = id(module) in known or not module._modules
        module.register_forward_pre_hook(found.trust if trusted else found.enter)
        module.register_forward_hook(found.distrust if trusted else found.leave)
    serial: Callable[..., Any] = model.forward

    def forward(*args: Any, **named: Any) -> Any:
        found.begin(model)
        with watching(found):
            return serial(*args, **named)

    model.forward = forward  # type: ignore[method-assign]


class _Operations:
    """What looks at the uses of primitives, and knows whose forward is running."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._running: list[Module] = []
        self._trusted = 0

    def begin(self, model: Module) -> None:
        """A pass begins; the one before may not have come to its end."""
        self._running, self._trusted = [model], 0

    def enter(self, module: Module, _: Any) -> None:
        """A hook before a module whose forward is not known."""
        self._running.append(module)

    def leave(self, *_: Any) -> None:
        """A hook after it."""
        if len(self._running) > 1:
            self._running.pop()

    def trust(self, *_: Any) -> None:
        """A hook before a module that is divided, or refuses blocks itself."""
        self._trusted += 1

    def distrust(self, *_: Any) -> None:
        """A hook after it."""
        self._trusted -= 1

    def __call__(
        self, name: str, shapes: tuple[Any, ...], attributes: dict[str, Any], out: Array
    ) -> None:
        """Refuse a use of a primitive that joins places of a block."""
        grid = self.grid
        if self._trusted or not grid.inside or name in _BY_PLACE:
            return
        dims = len(grid.whole)
        of_blocks = [one for one in shapes if len(one) == dims + 2 and one[2:] in grid.blocks]
        if not of_blocks or (name in _ALONG and _channels_only(attributes, dims + 2)):
            return
        shape = of_blocks[0]
        stays = name in _MOVES and out.ndim > dims and out.shape[-dims:] == shape[2:]
        if stays and _in_order(attributes.get("index", ()), dims + 2):
            return
        raise UserError(
            f"{where(self._running[-1])} calls {name} on {shape}, a block of images that "
            f"{grid.axis.name} divides, and would take it for the whole: use a layer of hpcml.nn, "
            'or declare where the region ends, spatial = {"name of a layer": "gather"}, or the '
            'module as "pointwise"'
        )


def _channels_only(attributes: dict[str, Any], ndim: int) -> bool:
    """Whether a reduction is along the channels alone, or the samples."""
    dim = attributes.get("dim", -1)
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return all(isinstance(one, int) and one % ndim < 2 for one in dims) and bool(dims)


def _in_order(index: Any, ndim: int) -> bool:
    """Whether an index takes places in the order in which they lie."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    rest = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    every = slice(None)
    parts[rest : rest + 1] = [every] * (ndim - len(parts[:rest]) - len(parts[rest + 1 :]))
    return all(isinstance(part, slice) and (part.step or 1) > 0 for part in parts[2:])
