"""Tensor parallelism: layers whose weights the ranks of an axis divide (Megatron-LM).

Shoeybi et al. 2019, section 3. A column-parallel layer divides its outputs, a row-parallel one its
inputs: one after the other they need a single sum over the ranks, and what lies between them, as
long as it is element by element or head by head, needs none. Each layer is made of a serial one and
keeps its parameters, names and first values; a rank has the part of a weight that it multiplies by.

    column = ColumnParallelLinear(mlp.c_fc, axis)
    row = RowParallelLinear(mlp.c_proj, axis)
    y = row(gelu(column(x)))  # the same on all ranks, as x is

States are those of `hpcml.collectives`: x is `I`, what lies between is `S(-1)`, y is `I`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml import collectives
from hpcml.autograd import Context, Tensor, primitive
from hpcml.autograd.record import empty
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import Embedding, Linear, Module, Parameter
from hpcml.nn import functional as F
from hpcml.nn.part import Part, Range, blocks


class ColumnParallelLinear(Module):
    """Y = X A^T + b with the rows of A, the outputs, divided: X in `I` -> Y in `S(-1)`.

    Forward communicates nothing, backward one all-reduce of the gradient of X (Megatron's f).

    ranges: the outputs of this rank, several for packed projections; by default its block.
    """

    def __init__(self, linear: Linear, axis: Axis, ranges: Sequence[Range] | None = None) -> None:
        super().__init__()
        self.axis = axis
        mine = tuple(ranges or (_block("outputs", linear.out_features, axis),))
        self.weight, self.bias = linear.weight, linear.bias
        _divide(self.weight, 0, mine, axis)
        if self.bias is not None:
            _divide(self.bias, 0, mine, axis)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., this rank's outputs)."""
        return F.linear(collectives.copy(input, self.axis), self.weight, self.bias)


class RowParallelLinear(Module):
    """Y = X A^T + b with the columns of A, the inputs, divided: X in `S(-1)` -> Y in `I`.

    Forward communicates one all-reduce of the products (Megatron's g), backward nothing. The bias
    is added once, after it, and every rank has it whole.

    ranges: the inputs of this rank; by default its block.
    """

    def __init__(self, linear: Linear, axis: Axis, ranges: Sequence[Range] | None = None) -> None:
        super().__init__()
        self.axis = axis
        mine = tuple(ranges or (_block("inputs", linear.in_features, axis),))
        self.weight, self.bias = linear.weight, linear.bias
        _divide(self.weight, 1, mine, axis)

    def forward(self, input: Tensor) -> Tensor:
        """(..., this rank's inputs) -> (..., out_features)."""
        total = collectives.all_reduce(F.linear(input, self.weight), self.axis, to="I")
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(Module):
    """Rows of a table, the table divided by rows: tokens -> `I`.

    A rank looks up the tokens whose rows it has and puts zeros for the others; one all-reduce of
    the result joins them. Backward communicates nothing.
    """

    def __init__(self, embedding: Embedding, axis: Axis) -> None:
        super().__init__()
        self.axis, self.num_embeddings = axis, embedding.num_embeddings
        self.mine = _block("num_embeddings", embedding.num_embeddings, axis)
        self.weight = embedding.weight
        _divide(self.weight, 0, (self.mine,), axis)

    def forward(self, input: Any) -> Tensor:
        """Integers (...) -> (..., embedding_dim)."""
        if self.axis.size == 1:
            return F.embedding(input, self.weight)
        tokens = np.asarray(input.data if isinstance(input, Tensor) else input)
        _check_range("index", tokens, self.num_embeddings)
        inside, place = _places(tokens, self.mine)
        found = F.embedding(place, self.weight)
        kept = found * inside[..., None].astype(found.dtype)
        return collectives.all_reduce(kept, self.axis, to="I")


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Any, axis: Axis, *, classes: int, ignore_index: int = -100
) -> Tensor:
    """The mean of -log softmax(logits)[target], the classes divided: `S(-1)` -> `I`.

    logits (N, this rank's block of the `classes`), as of a `ColumnParallelLinear`; target (N),
    numbers of classes of all ranks; `ignore_index` does not count. The ranks exchange three numbers
    a row, not the logits (Shoeybi et al. 2019, section 3): the largest logit, the sum of
    exponentials relative to it, and the logit of the target.
    """
    mine = _block("classes", classes, axis)
    if logits.ndim != 2 or logits.shape[1] != mine[1] - mine[0]:
        raise ValueError(
            f"logits {logits.shape}: of {classes} classes this rank has {mine[1] - mine[0]}"
        )
    if axis.size == 1:
        return F.cross_entropy(logits, target, ignore_index=ignore_index)
    numbers = np.asarray(target.data if isinstance(target, Tensor) else target)
    _check_range("target", numbers[numbers != ignore_index], classes)
    return _cross_entropy(logits, numbers, axis=axis, mine=mine, ignore_index=ignore_index)


@primitive
def _cross_entropy(
    ctx: Context, logits: Array, target: Array, *, axis: Axis, mine: Range, ignore_index: int
) -> Array:
    inside, place = _places(target, mine)
    most = axis.allreduce(logits.max(1), "max")
    both = empty((2, len(target)), logits)
    both[0] = np.exp(logits - most[:, None]).sum(1)
    both[1] = np.where(inside, np.take_along_axis(logits, place[:, None], 1)[:, 0], 0)
    axis.allreduce(both, out=both)
    rest = np.log(both[0])
    used = target != ignore_index
    count = int(used.sum())
    ctx.attributes = inside, place, used, count
    ctx.save(logits, most + rest)
    total = np.where(used, (most - both[1]) + rest, 0).sum(dtype=np.float64)
    return np.asarray(total / count if count else np.nan, dtype=logits.dtype)


@_cross_entropy.adjoint
def _cross_entropy_logits(ctx: Context, g: Array) -> Array:
    logits, lse = ctx.saved
    inside, place, used, count = ctx.attributes
    scale = np.where(used, g / max(count, 1), 0).astype(logits.dtype, copy=False)
    out = ctx.empty(logits.shape, logits)
    np.subtract(logits, lse[:, None], out=out)
    np.exp(out, out=out)
    out *= scale[:, None]
    rows = np.flatnonzero(inside)
    out[rows, place[rows]] -= scale[rows]
    return out


def _places(tokens: Array, mine: Range) -> tuple[Array, Array]:
    """Which tokens lie in a range, and their places there; 0 for the others."""
    inside = (tokens >= mine[0]) & (tokens < mine[1])
    return inside, np.where(inside, tokens - mine[0], 0).astype(np.int64)


def _check_range(what: str, numbers: Array, count: int) -> None:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"{what} {wrong} is outside 0..{count - 1}")


def _divide(parameter: Parameter, dim: int, ranges: tuple[Range, ...], axis: Axis) -> None:
    """Divide a parameter, once: one that two layers share must be divided alike for both."""
    if axis.size == 1:
        return
    before = parameter.part
    part = Part(parameter.shape if before is None else before.shape, dim, ranges)
    if before is None:
        parameter.divide(part, axis.name)
    elif before != part:
        raise UserError(
            f"{parameter.name} is shared and divided already, along dim {before.dim}: take a layer "
            "that divides it alike, or do not share it"
        )


def _block(what: str, n: int, axis: Axis) -> Range:
    if n < axis.size:
        raise UserError(
            f"{what}={n} cannot be divided among {axis.size} ranks along {axis.name}: "
            f"set mesh.{axis.name}={n} or fewer"
        )
    return blocks(n, axis.size)[axis.rank]
