"""Coarse operations with hand-written adjoints: where the speed is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml import kernels, rng
from hpcml.autograd.ops.pointwise import contiguous
from hpcml.autograd.primitive import Context, empty, primitive
from hpcml.backend import Array, xp


@primitive
def softmax(ctx: Context, x: Array, *, dim: int = -1) -> Array:
    """exp(x) / sum exp(x) along `dim`."""
    m = xp(x)
    out = m.subtract(x, x.max(axis=dim, keepdims=True), out=ctx.empty(x.shape, x))
    m.exp(out, out=out)
    out /= out.sum(axis=dim, keepdims=True)
    ctx.attributes = dim
    ctx.save(out)
    return out


@softmax.adjoint
def softmax_x(ctx: Context, g: Array) -> Array:
    (y,) = ctx.saved
    return y * (g - (g * y).sum(axis=ctx.attributes, keepdims=True))


@primitive
def log_softmax(ctx: Context, x: Array, *, dim: int = -1) -> Array:
    """x - log sum exp(x) along `dim`."""
    m = xp(x)
    out = m.subtract(x, x.max(axis=dim, keepdims=True), out=ctx.empty(x.shape, x))
    out -= m.log(m.exp(out).sum(axis=dim, keepdims=True))
    ctx.attributes = dim
    ctx.save(out)
    return out


@log_softmax.adjoint
def log_softmax_x(ctx: Context, g: Array) -> Array:
    (y,) = ctx.saved
    return g - xp(y).exp(y) * g.sum(axis=ctx.attributes, keepdims=True)


@primitive
def layer_norm(
    ctx: Context, x: Array, weight: Array | None, bias: Array | None, *, size: int, eps: float
) -> Array:
    """Normalise the last dimensions, `size` elements together, then scale and shift by element.

    Ba, Kiros, Hinton 2016. x (..., size), weight, bias of `size` elements or None.
    """
    x = contiguous(x)
    rows = x.size // size if size else 0
    none = empty((0,), x)
    mean, inverse = empty((rows,), x), empty((rows,), x)
    out = ctx.empty(x.shape, x)
    kernels.of(x).layer_norm(
        x.reshape(rows, size), none if weight is None else weight.reshape(-1),
        none if bias is None else bias.reshape(-1), x.dtype.type(eps), out.reshape(rows, size),
        mean, inverse,
    )  # fmt: skip
    ctx.attributes = rows, size, mean, inverse
    ctx.save(x, weight)
    return out


@layer_norm.adjoint
def layer_norm_x(ctx: Context, g: Array) -> Array:
    x, weight = ctx.saved
    rows, size, mean, inverse = ctx.attributes
    pending = ctx.take_pending()
    none = empty((0, size), x)
    out = ctx.empty(x.shape, x)
    kernels.of(x).layer_norm_backward(
        contiguous(g).reshape(rows, size), x.reshape(rows, size),
        none[:0, 0] if weight is None else weight.reshape(-1), mean, inverse,
        none if pending is None else contiguous(pending).reshape(rows, size),
        out.reshape(rows, size),
    )  # fmt: skip
    return out


@layer_norm.adjoint
def layer_norm_weight(ctx: Context, g: Array) -> Array:
    x, weight = ctx.saved
    rows, size, mean, inverse = ctx.attributes
    out = ctx.empty(weight.shape, x)
    kernels.of(x).layer_norm_weight_gradient(
        contiguous(g).reshape(rows, size), x.reshape(rows, size), mean, inverse, out.reshape(-1)
    )
    return out


@layer_norm.adjoint
def layer_norm_bias(ctx: Context, g: Array) -> Array:
    rows, size, _, _ = ctx.attributes
    out = ctx.empty(ctx.shapes[2], g)
    kernels.of(g).column_sums(contiguous(g).reshape(rows, size), out.reshape(-1))
    return out


def check_indices(index: Array, count: int, what: str) -> None:
    """Raise an IndexError unless 0 <= index < count everywhere: compiled loops do not look."""
    if index.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {index.dtype}")
    if index.size:
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= count:
            raise IndexError(f"{what} {least if least < 0 else most} is outside 0..{count - 1}")


@primitive
def cross_entropy(
    ctx: Context, logits: Array, target: Array, *, ignore_index: int = -100, reduction: str = "mean"
) -> Array:
    """-log softmax(logits)[target]: logits (N, C), target (N) of integers.

    reduction: "mean" over the targets that are not `ignore_index`, "sum", or "none" -> (N).
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, C) and targets (N), not {logits.shape}, {target.shape}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction="{reduction}": use "mean", "sum" or "none"')
    logits = contiguous(logits)
    target = contiguous(target.astype(np.int64, copy=False))
    used = target != ignore_index
    check_indices(target[used], logits.shape[1], "target")
    loss, lse = empty(target.shape, logits), empty(target.shape, logits)
    kernels.of(logits).cross_entropy(logits, target, ignore_index, loss, lse)
    count = int(used.sum()) if reduction == "mean" else 1
    ctx.attributes = target, ignore_index, count
    ctx.save(logits, lse)
    if reduction == "none":
        return loss
    total = loss.sum(dtype=np.float64)  # many small terms
    m = xp(loss)
    return m.asarray(total / count if count else m.nan, dtype=loss.dtype)


@cross_entropy.adjoint
def cross_entropy_logits(ctx: Context, g: Array) -> Array:
    logits, lse = ctx.saved
    target, ignore, count = ctx.attributes
    scale = contiguous(xp(g).broadcast_to(g / max(count, 1), lse.shape).astype(g.dtype, copy=False))
    out = ctx.empty(logits.shape, logits)
    kernels.of(logits).cross_entropy_backward(logits, target, ignore, lse, scale, out)
    return out


@primitive
def embedding(ctx: Context, weight: Array, index: Array) -> Array:
    """weight[index]: weight (count, width), index (...) of integers -> (..., width)."""
    check_indices(index, weight.shape[0], "index")
    ctx.attributes = index
    out = ctx.empty((*index.shape, weight.shape[1]), weight)
    # "clip" never applies after the check; the default would go through a second buffer
    return xp(weight).take(weight, index, axis=0, out=out, mode="clip")


@embedding.adjoint
def embedding_weight(ctx: Context, g: Array) -> Array:
    index = contiguous(ctx.attributes.astype(np.int64, copy=False)).reshape(-1)
    out = ctx.accumulator(ctx.shapes[0], g)
    kernels.of(g).embedding_backward(contiguous(g).reshape(-1, g.shape[-1]), index, out)
    return out


def threshold(p: float) -> int:
    """The 32-bit word from which an element is kept when it is dropped with probability p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout p={p}: must be at least 0 and below 1")
    return min(round(p * 2**32), 2**32 - 1)


@primitive
def dropout(ctx: Context, x: Array, *, p: float, name: str) -> Array:
    """Zero each element with probability p, scale the others by 1 / (1 - p).

    Dimension 0 counts samples: the mask of one depends on its number in the run and on `name`.
    """
    key, first = rng.draw(name)
    ctx.attributes = np.uint64(key), np.uint64(first), np.uint32(threshold(p))
    return _drop(ctx, x)


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


def _heads(x: Array, heads: int) -> Array:
    """(B, T, heads * D) as (B, heads, T, D), a view."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _prepare(
    ctx: Context, q: Array, scale: float | None, causal: bool, p: float, name: str
) -> None:
    key, first = rng.draw(name) if p > 0 else (0, 0)
    factor = q.dtype.type(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    ctx.attributes = (factor, causal, np.uint64(key), np.uint64(first), np.uint32(threshold(p)))


@primitive
def packed_attention(
    ctx: Context, qkv: Array, *, heads: int, causal: bool, p: float = 0.0, name: str = "attention"
) -> Array:
    """Self-attention of packed projections: qkv (B, T, 3 C), [q | k | v] -> (B, T, C)."""
    batch, length, width = qkv.shape
    if width % (3 * heads):
        raise ValueError(f"width {width} is not 3 * heads({heads}) * a head size")
    qkv = contiguous(qkv)
    q, k, v = _thirds(qkv, heads)
    _prepare(ctx, q, None, causal, p, name)
    out, lse = ctx.empty((batch, length, width // 3), qkv), empty((batch, heads, length), qkv)
    kernels.of(qkv).attention(q, k, v, *ctx.attributes, _heads(out, heads), lse)
    ctx.save(qkv, out, lse)
    return out


def _thirds(qkv: Array, heads: int) -> list[Array]:
    width = qkv.shape[2] // 3
    return [_heads(qkv[:, :, i * width : (i + 1) * width], heads) for i in range(3)]


@packed_attention.adjoint
def packed_attention_qkv(ctx: Context, g: Array) -> Array:
    qkv, out, lse = ctx.saved
    heads = lse.shape[1]
    result = ctx.empty(qkv.shape, qkv)
    kernels.of(qkv).attention_backward(
        *_thirds(qkv, heads), _heads(out, heads), lse, _heads(contiguous(g), heads),
        *ctx.attributes, *_thirds(result, heads),
    )  # fmt: skip
    return result


@primitive
def attention(
    ctx: Context, q: Array, k: Array, v: Array, *,
    causal: bool = False, scale: float | None = None, p: float = 0.0, name: str = "attention",
) -> Array:  # fmt: skip
    """softmax(scale q k^T) v: q (B, H, T, D), k, v (B, H, S, D) -> (B, H, T, D)."""
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, T, D), k, v (B, H, S, D) needed, not {q.shape}, {k.shape}, {v.shape}")
    q, k, v = _row_major(q), _row_major(k), _row_major(v)
    _prepare(ctx, q, scale, causal, p, name)
    out, lse = ctx.empty(q.shape, q), empty(q.shape[:3], q)
    kernels.of(q).attention(q, k, v, *ctx.attributes, out, lse)
    ctx.save(q, k, v, out, lse)
    return out


def _row_major(x: Array) -> Array:
    """x, or a copy whose rows are contiguous: all that the attention kernels ask."""
    rows = x.strides[3] == x.itemsize and x.strides[2] >= x.shape[3] * x.itemsize
    return x if rows else xp(x).ascontiguousarray(x)


def _attention_gradients(ctx: Context, g: Array) -> Any:
    q, k, v, out, lse = ctx.saved

    def compute() -> tuple[Array, Array, Array]:
        grads = empty(q.shape, q), empty(k.shape, k), empty(v.shape, v)
        kernels.of(q).attention_backward(q, k, v, out, lse, _row_major(g), *ctx.attributes, *grads)
        return grads

    return ctx.shared(compute)


@attention.adjoint
def attention_q(ctx: Context, g: Array) -> Array:
    return _attention_gradients(ctx, g)[0]


@attention.adjoint
def attention_k(ctx: Context, g: Array) -> Array:
    return _attention_gradients(ctx, g)[1]


@attention.adjoint
def attention_v(ctx: Context, g: Array) -> Array:
    return _attention_gradients(ctx, g)[2]
