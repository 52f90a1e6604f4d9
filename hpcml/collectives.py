"""Differentiable collectives: each moves a tensor between layouts, and its adjoint moves back.

Along an axis of the mesh a tensor is in one of four states:

- `R`, replicated: all ranks hold the same values, and each makes its own use of them. The gradient
  that a rank computes is partial: the whole is the sum over the ranks.
- `P`, partial: the value is the sum of what the ranks hold. Its gradient is replicated.
- `I`, invariant: all ranks hold the same values and make the same use of them, so each has the
  whole gradient already.
- `S(dim)`, sharded: each rank holds a block along `dim`, in the order of the ranks, and its
  gradient.

A tensor does not carry its state: the functions say which one they take and give. A rank may hold
`R` and `I` in the same bits; what differs is the adjoint. See `_ROWS` for the table of both.

On an axis of size 1 every function returns its argument. Under `no_grad` nothing is recorded. The
adjoints communicate, so all ranks must call backward alike, and `requires_grad` of the argument
must be the same on all ranks; where it is false, backward does not communicate at all. Errors
(`ValueError`: a state that the operation does not lead to, a dim that cannot be cut) are raised
before anything is sent.

The states and the pairs of adjoints are those of Hewett and Grady 2020, "A linear algebraic
approach to model parallelism in deep learning"; `R` and `I` are told apart as in Shoeybi et al.
2019, "Megatron-LM", section 3, where `copy` is f and `all_reduce` to `I` is g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpcml.autograd.primitives import Primitive, movement
from hpcml.autograd.record import Context
from hpcml.autograd.tensor import Tensor
from hpcml.backend import Array
from hpcml.comm import Axis, Halo
from hpcml.comm.shards import Shards

Counts = Sequence[int] | None


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Begin to use invariant values by each rank in its own way: I -> R. Nothing is communicated.

    Adjoint: all-reduce. Megatron-LM's f: what comes before a column-parallel product, and how
    weights that all ranks share enter the computation of one part of the data.
    """
    return _apply("copy", x, axis, axis)


def all_reduce(x: Tensor, axis: Axis, *, to: str) -> Tensor:
    """Sum partial values over the ranks: P -> I or P -> R, as `to` says.

    Adjoint: the identity from `I` (Megatron-LM's g: what comes after a row-parallel product), from
    `R` an all-reduce.
    """
    return _apply(_state("all_reduce", to=to), x, axis, axis)


def all_gather(x: Tensor, axis: Axis, dim: int = 0, *, to: str, counts: Counts = None) -> Tensor:
    """Join the blocks of all ranks along `dim`: S(dim) -> R or S(dim) -> I, as `to` says.

    x (..., n, ...) -> (..., sum of the n of all ranks, ...). counts: the n of each rank, the same
    list on all, where they differ. Adjoint: reduce-scatter from `R` (ZeRO stage 3, Rajbhandari et
    al. 2020, section 5.3; sequence parallelism, Korthikanti et al. 2022, section 4.2.2), from `I`
    the rank's slice.
    """
    row = _state("all_gather", to=to)
    return _apply(row, x, axis, Shards.of("all_gather", x.shape, axis, dim, counts, whole=False))


def scatter(x: Tensor, axis: Axis, dim: int = 0, *, source: str, counts: Counts = None) -> Tensor:
    """Keep this rank's slice along `dim`: I -> S(dim) or R -> S(dim). Nothing is communicated.

    x (..., n, ...) -> (..., n / size, ...), or blocks of `counts`. Along the first dim that is
    longer than 1 the result is a view. Adjoint: all-gather to `I` (Megatron-LM's scatter to a
    tensor-parallel region); to `R` the gradient in its place among zeros.
    """
    row = _state("scatter", source=source)
    return _apply(row, x, axis, Shards.of("scatter", x.shape, axis, dim, counts, whole=True))


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0, *, counts: Counts = None) -> Tensor:
    """Sum partial values and keep this rank's slice of the sum along `dim`: P -> S(dim).

    x (..., n, ...) -> (..., n / size, ...), or blocks of `counts`. Adjoint: all-gather (Korthikanti
    et al. 2022, "Reducing activation recomputation in large transformer models", section 4.2.2).
    """
    shards = Shards.of("reduce_scatter", x.shape, axis, dim, counts, whole=True)
    return _apply("reduce_scatter", x, axis, shards)


def all_to_all(
    x: Tensor,
    axis: Axis,
    split_dim: int,
    concat_dim: int,
    *,
    split_counts: Counts = None,
    concat_counts: Counts = None,
) -> Tensor:
    """Cut along another dim than before: S(concat_dim) -> S(split_dim).

    x is this rank's block along `concat_dim`, whole along `split_dim`; the result is the other way
    round. `split_counts` and `concat_counts`: cells of each rank's block along either dim, where
    they differ. Adjoint: the same with the dims exchanged (Jacobs et al. 2023, "DeepSpeed Ulysses",
    section 3.1, where sequence is exchanged for heads).
    """
    split = Shards.of("all_to_all", x.shape, axis, split_dim, split_counts, whole=True)
    concat = Shards.of("all_to_all", x.shape, axis, concat_dim, concat_counts, whole=False)
    if split.dim == concat.dim:
        raise ValueError(
            f"all_to_all: split_dim and concat_dim are both {split.dim}: take two, "
            "or axis.alltoall to exchange blocks of one dim"
        )
    return _apply("all_to_all", x, axis, (split, concat))


def halo_exchange(x: Tensor, halo: Halo) -> Tensor:
    """Surround this rank's block by its neighbours' cells: S -> S with ghosts; see `Halo`.

    Adjoint: gradients of ghosts go back to the ranks that own the cells and are added there
    (Hewett and Grady 2020; for convolutions Dryden et al. 2019).
    """
    if halo.padded(x.shape) == x.shape and halo.axis.size == 1:
        return _tensor(x)
    return _ROWS["halo_exchange"](x, how=halo)


# --- what happens to arrays: forward and adjoint alike ------------------------------------------


def _same(ctx: Context, x: Array, axis: Axis) -> Array:
    return x


def _summed(ctx: Context, x: Array, axis: Axis) -> Array:
    return axis.allreduce(x, out=ctx.empty(x.shape, x))


def _gathered(ctx: Context, x: Array, shards: Shards) -> Array:
    out = ctx.empty(shards.whole(x.shape), x)
    flat = shards.room(out)
    shards.axis.allgather(x.reshape(-1), out=flat, counts=shards.elements(x.shape))
    shards.join(flat, out)
    return out


def _summed_and_cut(ctx: Context, x: Array, shards: Shards) -> Array:
    out = ctx.empty(shards.own(x.shape), x)
    flat, counts = shards.in_order(x), shards.elements(x.shape)
    shards.axis.reduce_scatter(flat, out=out.reshape(-1), counts=counts)
    return out


def _sliced(ctx: Context, x: Array, shards: Shards) -> Array:
    part = x[shards.index(shards.axis.rank)]
    if part.flags.c_contiguous:
        return part
    out = ctx.empty(part.shape, x)
    out[...] = part
    return out


def _embedded(ctx: Context, x: Array, shards: Shards) -> Array:
    out = ctx.accumulator(shards.whole(x.shape), x)
    out[shards.index(shards.axis.rank)] += x
    return out


def _exchanged(ctx: Context, x: Array, cuts: tuple[Shards, Shards]) -> Array:
    split, concat = cuts
    out = ctx.empty(concat.whole(split.own(x.shape)), x)
    flat = concat.room(out)
    sends, receives = split.elements(x.shape), concat.elements(out.shape)
    split.axis.alltoall(split.in_order(x), out=flat, sends=sends, receives=receives)
    concat.join(flat, out)
    return out


def _exchanged_back(ctx: Context, g: Array, cuts: tuple[Shards, Shards]) -> Array:
    return _exchanged(ctx, g, cuts[::-1])


def _with_ghosts(ctx: Context, x: Array, halo: Halo) -> Array:
    return halo.exchange(x, out=ctx.empty(halo.padded(x.shape), x))


def _without_ghosts(ctx: Context, g: Array, halo: Halo) -> Array:
    return halo.adjoint(g, out=ctx.empty(ctx.shapes[0], g))


# --- the table ----------------------------------------------------------------------------------


def _row(
    name: str,
    forward: Callable[[Context, Array, Any], Array],
    adjoint: Callable[[Context, Array, Any], Array],
) -> Primitive:
    """A primitive of these two, which both get what the call is told besides the array."""

    def run(ctx: Context, x: Array, *, how: Any) -> Array:
        ctx.attributes = how
        return forward(ctx, x, how)

    run.__name__ = name
    row = movement(run)
    row.hands_on = forward is _same
    row.adjoint(lambda ctx, g: adjoint(ctx, g, ctx.attributes))
    return row


_ROWS = {
    # operation and its free state                 forward           adjoint
    "copy": _row("copy", _same, _summed),  # I -> R
    "all_reduce I": _row("all_reduce", _summed, _same),  # P -> I
    "all_reduce R": _row("all_reduce", _summed, _summed),  # P -> R
    "all_gather R": _row("all_gather", _gathered, _summed_and_cut),  # S -> R
    "all_gather I": _row("all_gather", _gathered, _sliced),  # S -> I
    "scatter I": _row("scatter", _sliced, _gathered),  # I -> S
    "scatter R": _row("scatter", _sliced, _embedded),  # R -> S
    "reduce_scatter": _row("reduce_scatter", _summed_and_cut, _gathered),  # P -> S
    "all_to_all": _row("all_to_all", _exchanged, _exchanged_back),  # S(i) -> S(j)
    "halo_exchange": _row("halo_exchange", _with_ghosts, _without_ghosts),  # S -> S + ghosts
}
"""The adjoint table: operation (and the state that is the caller's choice), forward, adjoint."""


def _state(operation: str, **choice: str) -> str:
    """The row of an operation for the state that the caller names."""
    ((what, state),) = choice.items()
    if state not in ("I", "R"):
        raise ValueError(
            f'{operation}: {what}={state!r}: choose "R" (replicated: each rank makes its own use) '
            'or "I" (invariant: all make the same)'
        )
    return f"{operation} {state}"


def _apply(row: str, x: Tensor, axis: Axis, how: Any) -> Tensor:
    return _tensor(x) if axis.size == 1 else _ROWS[row](x, how=how)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)
