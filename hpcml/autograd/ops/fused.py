"""Coarse operations with hand-written adjoints: where the speed is."""

from __future__ import annotations

import numpy as np

from hpcml import kernels, rng
from hpcml.autograd.halves import HALVES, narrowed, widened
from hpcml.autograd.ops.arrays import check_indices, contiguous, dense, flat, floats, integers
from hpcml.autograd.primitives import movement, primitive
from hpcml.autograd.record import Context, empty, sums
from hpcml.backend import Array, xp


def _below_maximum(ctx: Context, x: Array, dim: int) -> Array:
    """x - max x along `dim`, of which the exponential cannot overflow."""
    if x.size == 0:
        return ctx.empty(x.shape, x)  # the maximum of nothing would be an error
    return xp(x).subtract(x, x.max(axis=dim, keepdims=True), out=ctx.empty(x.shape, x))


@primitive
def softmax(ctx: Context, x: Array, *, dim: int = -1) -> Array:
    """exp(x) / sum exp(x) along `dim`."""
    m = xp(x)
    out = _below_maximum(ctx, x, dim)
    m.exp(out, out=out)
    out /= out.sum(axis=dim, keepdims=True)
    ctx.attributes = dim
    ctx.save(out)
    return out


@softmax.adjoint
def softmax_x(ctx: Context, g: Array) -> Array:
    (y,) = ctx.saved
    out = xp(y).multiply(g, y, out=ctx.empty(y.shape, y))
    out -= y * out.sum(axis=ctx.attributes, keepdims=True)
    return out


@primitive
def log_softmax(ctx: Context, x: Array, *, dim: int = -1) -> Array:
    """x - log sum exp(x) along `dim`."""
    m = xp(x)
    out = _below_maximum(ctx, x, dim)
    if x.size:
        out -= m.log(m.exp(out).sum(axis=dim, keepdims=True))
    ctx.attributes = dim
    ctx.save(out)
    return out


@log_softmax.adjoint
def log_softmax_x(ctx: Context, g: Array) -> Array:
    (y,) = ctx.saved
    out = xp(y).exp(y, out=ctx.empty(y.shape, y))
    out *= g.sum(axis=ctx.attributes, keepdims=True)
    return xp(y).subtract(g, out, out=out)


@primitive
def cross_entropy(
    ctx: Context, logits: Array, target: Array, *, ignore_index: int = -100, reduction: str = "mean"
) -> Array:
    """-log softmax(logits)[target]: logits (N, C), target (N) of integers.

    reduction: "mean" over the targets that are not `ignore_index`, "sum", or "none" -> (N).
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (N, C) and targets (N), not {logits.shape}, {target.shape}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction="{reduction}": use "mean", "sum" or "none"')
    m = xp(logits)
    logits, target = floats(logits), integers(m.asarray(target), "target")
    used = target != ignore_index
    if m is np:  # a GPU's kernel makes a loss of NaN: to look would be to wait for it
        check_indices(target[used], logits.shape[1], "target")
    loss, lse = sums(target.shape, logits), sums(target.shape, logits)
    kernels.of(logits).cross_entropy(logits, target, ignore_index, loss, lse)
    count = 1 if reduction != "mean" else int(used.sum()) if m is np else used.sum()
    ctx.attributes = target, ignore_index, count
    ctx.save(logits, lse)
    if reduction == "none":
        return loss
    total = loss.sum(dtype=np.float64)  # many small terms
    none = m is np and not count  # NumPy would warn of 0 / 0
    return m.asarray(m.nan if none else total / count, dtype=loss.dtype)


cross_entropy.on_device = True


@cross_entropy.adjoint
def cross_entropy_logits(ctx: Context, g: Array) -> Array:
    logits, lse = ctx.saved
    target, ignore, count = ctx.attributes
    m = xp(g)
    count = max(count, 1) if isinstance(count, int) else m.maximum(count, 1)
    scale = contiguous(m.broadcast_to(g / count, lse.shape).astype(lse.dtype, copy=False))
    out = ctx.empty(logits.shape, logits)
    kernels.of(logits).cross_entropy_backward(logits, target, ignore, lse, scale, out)
    return out


@movement
def embedding(ctx: Context, weight: Array, index: Array) -> Array:
    """weight[index]: weight (count, width), index (...) of integers -> (..., width)."""
    index = integers(xp(weight).asarray(index), "index")
    if xp(weight) is np:
        check_indices(index, weight.shape[0], "index")
    ctx.attributes = index
    out = ctx.empty((*index.shape, weight.shape[1]), weight)
    if xp(weight) is np:
        # "clip" never applies after the check; the default would go through a second buffer
        return np.take(weight, index, axis=0, out=out, mode="clip")
    return xp(weight).take(weight, index, axis=0, out=out)


@embedding.adjoint
def embedding_weight(ctx: Context, g: Array) -> Array:
    index = ctx.attributes.reshape(-1)
    out = ctx.accumulator(ctx.shapes[0], g)
    if g.dtype in HALVES and isinstance(g, np.ndarray):
        _add_rows(out, index, widened(g).reshape(index.size, out.shape[1]))
        return out
    kernels.of(g).embedding_backward(contiguous(g).reshape(index.size, out.shape[1]), index, out)
    return out


def _add_rows(out: Array, index: Array, rows: Array) -> None:
    """out[index] += rows, for 16-bit `out`: each of its rows is rounded once."""
    m = xp(out)
    used, place = m.unique(index, return_inverse=True)
    total = empty((used.size, out.shape[1]), rows)
    total[...] = widened(out[used])
    kernels.of(rows).embedding_backward(rows, place.reshape(-1), total)
    out[used] = narrowed(total, out.dtype)


def threshold(p: float) -> int:
    """The 32-bit word from which an element is kept when it is dropped with probability p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout p={p}: must be at least 0 and below 1")
    return min(round(p * 2**32), 2**32 - 1)


Runs = tuple[list[tuple[int, int]], int]
"""Elements of a sample: (first, count) of neighbours, and after how many come the same again."""


@primitive
def dropout(ctx: Context, x: Array, *, p: float, name: str, part: Runs | None = None) -> Array:
    """Zero each element with probability p, scale the others by 1 / (1 - p).

    Dimension 0 counts samples: the mask of one depends on its number in the run and on `name`.
    part: the elements that x has of each; by default all.
    """
    key, first = rng.draw(name)
    size = x.size // x.shape[0] if x.ndim and x.size else x.size
    runs, period = part or ([(0, size)], size)
    where = np.array(runs, np.int64).reshape(-1, 2), period
    ctx.attributes = np.uint64(key), np.uint64(first), np.uint32(threshold(p)), *where
    return _drop(ctx, floats(x))


dropout.on_device = True


@dropout.adjoint
def dropout_x(ctx: Context, g: Array) -> Array:
    return _drop(ctx, g)


def _drop(ctx: Context, x: Array) -> Array:
    x = contiguous(x)
    out = ctx.empty(x.shape, x)
    rows = x.shape[0] if x.ndim else 1
    shape = (rows, x.size // rows if rows else 0)
    kernels.of(x).dropout(x.reshape(shape), *ctx.attributes, out.reshape(shape))
    return out


@primitive
def gelu(ctx: Context, x: Array, *, approximate: str = "none") -> Array:
    """x Phi(x), or its tanh form (Hendrycks and Gimpel 2016)."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate="{approximate}": use "none" or "tanh"')
    x = dense(x)
    ctx.save(x)
    ctx.attributes = approximate
    return _gelu(ctx, x)


def _gelu(ctx: Context, x: Array) -> Array:
    out = ctx.like(x)
    kernel = kernels.of(x)
    (kernel.gelu if ctx.attributes == "none" else kernel.gelu_tanh)(flat(x, x), flat(out, x))
    return out


@gelu.remade
def gelu_again(ctx: Context) -> Array:
    return _gelu(ctx, *ctx.saved)


gelu.on_device = True


@gelu.adjoint
def gelu_x(ctx: Context, g: Array) -> Array:
    (x,) = ctx.saved
    out = ctx.like(x)
    k = kernels.of(x)
    kernel = k.gelu_backward if ctx.attributes == "none" else k.gelu_tanh_backward
    kernel(flat(g, x), flat(x, x), flat(out, x))
    return out
