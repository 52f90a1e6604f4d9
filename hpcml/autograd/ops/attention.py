"""Attention without storing the probabilities (Dao et al. 2022, "FlashAttention")."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from hpcml import kernels, rng
from hpcml.autograd.ops.arrays import contiguous, floats, same_type
from hpcml.autograd.ops.fused import threshold
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context, empty, sums
from hpcml.backend import Array


class Plan(NamedTuple):
    """What the attention kernels are told besides arrays, in their order."""

    scale: Any
    causal: bool
    key: Any
    sample: Any
    threshold: Any
    head: int
    query: int = 0
    position: int = 0


def _heads(x: Array, heads: int) -> Array:
    """(B, T, heads * D) as (B, heads, T, D), a view."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def plan(
    q: Array, causal: bool, p: float, name: str, scale: float | None = None, head: int = 0
) -> Plan:
    """The plan of attention to all keys for q (..., D); `head` is the number of its first head."""
    if q.shape[-1] == 0:
        raise ValueError(f"q {q.shape}: a head needs a size of at least 1")
    kind = np.float64 if q.dtype == np.float64 else np.float32
    factor = kind(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    key, sample = rng.draw(name) if p > 0 else (0, 0)
    return Plan(factor, causal, np.uint64(key), np.uint64(sample), np.uint32(threshold(p)), head)


@primitive
def packed_attention(
    ctx: Context, qkv: Array, *,
    heads: int, causal: bool, p: float = 0.0, name: str = "attention", head: int = 0,
) -> Array:  # fmt: skip
    """Self-attention of packed projections: qkv (B, T, 3 C), [q | k | v] -> (B, T, C).

    head: the number of the first head, where these are some of those that attention has.
    """
    batch, length, width = qkv.shape
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"width {width} is not 3 * heads({heads}) * a head size")
    qkv = floats(qkv)
    q, k, v = _thirds(qkv, heads)
    ctx.attributes = plan(q, causal, p, name, head=head)
    out, lse = ctx.empty((batch, length, width // 3), qkv), sums((batch, heads, length), qkv)
    kernels.of(qkv).attention(q, k, v, *ctx.attributes, _heads(out, heads), lse)
    ctx.save(qkv, out, lse)
    return out


packed_attention.on_device = True


def _thirds(qkv: Array, heads: int) -> Array:
    batch, length, width = qkv.shape
    return qkv.reshape(batch, length, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4)


@packed_attention.adjoint
def packed_attention_qkv(ctx: Context, g: Array) -> Array:
    qkv, out, lse = ctx.saved
    heads = lse.shape[1]
    result = ctx.empty(qkv.shape, qkv)
    kernels.of(qkv).attention_backward(
        *_thirds(qkv, heads), _heads(out, heads), lse, _heads(contiguous(g), heads),
        *ctx.attributes, False, *_thirds(result, heads),
    )  # fmt: skip
    return result


@primitive
def attention(
    ctx: Context, q: Array, k: Array, v: Array, *,
    causal: bool = False, scale: float | None = None, p: float = 0.0, name: str = "attention",
) -> Array:  # fmt: skip
    """softmax(scale q k^T) v: q (B, H, T, D), k, v (B, H, S, D) -> (B, H, T, D)."""
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q (B, H, T, D), k, v (B, H, S, D) needed, not {q.shape}, {k.shape}, {v.shape}"
        )
    if q.size and not k.size:
        raise ValueError(f"q {q.shape}, k {k.shape}: queries need at least one key")
    same_type(ctx, "q", "k", "v")
    q, k, v = _row_major(q), _row_major(k), _row_major(v)
    ctx.attributes = plan(q, causal, p, name, scale)
    out, lse = ctx.empty(q.shape, q), sums(q.shape[:3], q)
    kernels.of(q).attention(q, k, v, *ctx.attributes, out, lse)
    ctx.save(q, k, v, out, lse)
    return out


attention.on_device = True


def _row_major(x: Array) -> Array:
    """x, or a copy whose rows are contiguous: all that the attention kernels ask."""
    rows = x.strides[3] == x.itemsize and x.strides[2] >= x.shape[3] * x.itemsize
    return x if rows and getattr(x.flags, "behaved", True) else x.copy()


def _attention_gradients(ctx: Context, g: Array) -> Any:
    q, k, v, out, lse = ctx.saved

    def compute() -> tuple[Array, Array, Array]:
        grads = empty(q.shape, q), empty(k.shape, k), empty(v.shape, v)
        kernels.of(q).attention_backward(
            q, k, v, out, lse, _row_major(g), *ctx.attributes, False, *grads
        )
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
