"""What becomes of a layer that a model declares to be divided: one function for each style."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml.errors import UserError
from hpcml.nn import Dropout, Embedding, Linear, Module, MultiheadAttention, PackedAttention
from hpcml.nn.part import blocks
from hpcml.parallel.tensor.attention import ParallelAttention, share_heads
from hpcml.parallel.tensor.convolutions import (
    CONVOLUTIONS,
    NORMS,
    ColumnParallelConv,
    RowParallelConv,
    divide_groups,
    divide_norm,
)
from hpcml.parallel.tensor.dropout import DividedDropout
from hpcml.parallel.tensor.layers import ColumnParallelLinear, OutputLinear, RowParallelLinear
from hpcml.parallel.tensor.naive import NaiveEmbedding, NaiveLinear
from hpcml.parallel.tensor.parts import block, divide_parameter
from hpcml.parallel.tensor.positions import Positions
from hpcml.parallel.tensor.vocab import PositionEmbedding, VocabParallelEmbedding

Style = Callable[[Module, Positions], Module]
"""From a module, and the ranks and positions, to what takes its place; it may be itself."""


def _take(module: Module, style: str, kind: type[Module]) -> Any:
    if not is_plain(module, kind):
        raise UserError(
            f'splits: "{style}" takes an nn.{kind.__name__}, not {module.name}, which is a '
            f"{type(module).__name__}"
        )
    return module


def is_plain(module: Module, kind: type[Module]) -> bool:
    """Whether a module computes what one of this kind does."""
    return type(module).forward is kind.forward


def _linear(style: str, make: Callable[..., Module], **options: Any) -> Style:
    def made(module: Module, positions: Positions) -> Module:
        linear = _take(module, style, Linear)
        return make(linear, positions.tp, positions=positions, **options)

    return made


def _either(style: str, linear: Style, conv: Callable[..., Module]) -> Style:
    """Of a linear layer or a convolution."""

    def made(module: Module, positions: Positions) -> Module:
        if any(is_plain(module, kind) for kind in CONVOLUTIONS):
            return conv(module, positions.tp, positions=positions)
        if not is_plain(module, Linear):
            raise UserError(
                f'splits: "{style}" takes an nn.Linear or a convolution, not {module.name}, which '
                f"is a {type(module).__name__}"
            )
        return linear(module, positions)

    return made


def _vocab(module: Module, positions: Positions) -> Module:
    embedding = _take(module, "vocab", Embedding)
    return VocabParallelEmbedding(embedding, positions.tp, positions=positions)


def _positions(module: Module, positions: Positions) -> Module:
    embedding = _take(module, "positions", Embedding)
    return PositionEmbedding(embedding, positions) if positions.divided else module


def _heads(module: Module, positions: Positions) -> Module:
    if is_plain(module, PackedAttention):
        attention: Any = module
        return ParallelAttention(attention, positions.tp, positions)
    name = next((name for name in ("num_heads", "heads") if hasattr(module, name)), None)
    if name is None or isinstance(module, PackedAttention | MultiheadAttention):
        raise UserError(
            'splits: "heads" takes an nn.PackedAttention, or a module of your own with a number '
            f"num_heads or heads, not {module.name}, a {type(module).__name__}"
        )
    cp = positions.cp.size
    if cp > 1:
        raise UserError(
            f"mesh.cp={cp} needs nn.PackedAttention, which {module.name}, a "
            f"{type(module).__name__}, is not: set mesh.cp=1"
        )
    setattr(module, name, share_heads(getattr(module, name), positions.tp)[0])
    return module


def _divided(module: Module, positions: Positions) -> Module:
    axis = positions.tp
    for one in module.modules():
        if any(is_plain(one, kind) for kind in CONVOLUTIONS):
            divide_groups(one, positions)
            continue
        for parameter in one._parameters.values():
            width = parameter.whole_shape[-1]
            block(f"{parameter.name}: features", width, axis)
            cuts = [(ranges,) for ranges in blocks(width, axis.size)]
            divide_parameter(parameter, len(parameter.whole_shape) - 1, cuts, axis)
        if isinstance(one, NORMS):
            divide_norm(one, positions)
    for parent in module.modules():
        for name, child in parent.named_children():
            if is_plain(child, Dropout):
                setattr(parent, name, _divided_dropout(child, positions))
    return _divided_dropout(module, positions) if is_plain(module, Dropout) else module


def _divided_dropout(module: Any, positions: Positions) -> Module:
    return DividedDropout(module, positions)


def _replicated(module: Module, positions: Positions) -> Module:
    for parameter in module.parameters():
        parameter.layout[positions.tp.name] = "R"
    return module


def _same(module: Module, positions: Positions) -> Module:
    return module


def _naive_linear(module: Module, positions: Positions) -> Module:
    return NaiveLinear(_take(module, "naive", Linear), positions.tp)


def _naive_embedding(module: Module, positions: Positions) -> Module:
    return NaiveEmbedding(_take(module, "naive", Embedding), positions.tp)


MEGATRON: dict[str, Style] = {
    "column": _either("column", _linear("column", ColumnParallelLinear), ColumnParallelConv),
    "row": _either("row", _linear("row", RowParallelLinear), RowParallelConv),
    "qkv": _linear("qkv", ColumnParallelLinear, packed=3),
    "heads": _heads,
    "vocab": _vocab,
    "positions": _positions,
    "output": _linear("output", OutputLinear),
    "divided": _divided,
    "replicated": _replicated,
}
NAIVE: dict[str, Style] = {
    **dict.fromkeys(("column", "row", "qkv", "output"), _naive_linear),
    **dict.fromkeys(("heads", "positions", "divided", "replicated"), _same),
    "vocab": _naive_embedding,
}
