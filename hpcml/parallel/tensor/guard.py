"""What a divided model refuses while it runs, by the name of the layer that would get it wrong.

Layers that no pattern names are on every rank whole. Where one gets a part of what it would get on
one rank, it may fail with a shape that says nothing, or compute something else without a word.
"""

from __future__ import annotations

from typing import Any

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    MultiheadAttention,
    PackedAttention,
)
from hpcml.parallel.tensor.convolutions import NORMS
from hpcml.parallel.tensor.dropout import DividedDropout, PositionsDropout
from hpcml.parallel.tensor.positions import Positions
from hpcml.parallel.tensor.replacing import replace
from hpcml.parallel.tensor.styles import is_plain


def guard(model: Module, positions: Positions) -> None:
    """Let what is on every rank whole refuse parts; raises UserError for what it always would."""
    dropouts: dict[int, Module] = {}
    for module in model.modules():
        if positions.divided and isinstance(module, Embedding):
            raise UserError(
                f"{module.name}, a {type(module).__name__}: ranks have some positions only: "
                'declare it "vocab" or "positions" in splits'
            )
        if positions.divided and isinstance(module, PackedAttention | MultiheadAttention):
            raise UserError(
                f"{module.name}, a {type(module).__name__}: ranks have some positions only: use "
                'nn.PackedAttention and declare it "heads" in splits'
            )
        kind: Any = module
        if is_plain(module, Linear):
            module.register_forward_pre_hook(_Whole(positions, kind.in_features))
        elif is_plain(module, LayerNorm):
            module.register_forward_pre_hook(_Whole(positions, kind.normalized_shape[-1]))
        elif isinstance(module, NORMS) and not hasattr(module, "counts"):
            module.register_forward_pre_hook(_Whole(positions, kind.num_features, dim=1))
        if isinstance(module, PackedAttention):
            module.register_forward_pre_hook(_Outside(positions))
        if is_plain(module, Dropout) and not isinstance(module, DividedDropout):
            made: Any = module
            dropouts[id(module)] = PositionsDropout(made, positions)
    replace(model, dropouts)
    model.register_forward_pre_hook(_Begin(positions))
    model.register_forward_hook(_End(positions))


class _Whole:
    """A hook before a module that takes all features, so many along `dim`."""

    def __init__(self, positions: Positions, takes: int, dim: int = -1) -> None:
        self.positions, self.takes, self.dim = positions, takes, dim

    def __call__(self, module: Module, inputs: tuple[Any, ...]) -> None:
        came = inputs[0].shape[self.dim :][:1] if inputs else ()
        if came and came[0] != self.takes:
            raise UserError(
                f"{module.name}, a {type(module).__name__} of {self.takes} features: "
                f'{self.positions.called(came[0])} came: what a "column" layer has divided goes to '
                'a "row" layer, which adds up'
            )


class _Outside:
    """A hook before a module that must not be where features are divided."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, module: Module, inputs: tuple[Any, ...]) -> None:
        if self.positions.features is not None:
            raise UserError(
                f"{module.name}, a {type(module).__name__}, gets features that ranks divide: "
                'declare it "heads" in splits'
            )


class _Begin:
    """A hook before the model."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, *_: Any) -> None:
        self.positions.features, self.positions.ended = None, 0


class _End:
    """A hook after the model: what leaves it must be whole, or known to be divided."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, model: Module, inputs: Any, out: Any) -> None:
        kind, positions = type(model).__name__, self.positions
        if positions.features is not None:
            raise UserError(
                f'{kind} ends with features that ranks divide: its last "column" layer must be '
                '"output" in splits, or a "row" layer must follow'
            )
        found = sum(isinstance(one, Tensor) and one.ndim > 1 for one in _each(out))
        if positions.divided and found > positions.ended:
            raise UserError(
                f"{kind} has {found} outputs, of which {positions.ended} are of a layer that is "
                '"output" in splits: the others would be of some positions only'
            )


def _each(out: Any) -> list[Any]:
    if isinstance(out, dict):
        out = list(out.values())
    return list(out) if isinstance(out, tuple | list) else [out]
