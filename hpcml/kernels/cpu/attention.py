"""Exact attention in tiles of queries, without storing the probabilities.

Forward keeps the output and the logarithm of each row's sum of exponentials; backward makes the
probabilities again tile by tile (Dao et al. 2022, "FlashAttention", sections 3.1 and B.2). A tile
of 32 to 64 queries against the keys up to the diagonal stays in the second-level cache.

q (B, H, T, D), k, v (B, H, S, D) and their gradients may be views into larger arrays as long as the
last dimension is contiguous, so that packed projections need no transposition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from hpcml.kernels.cpu.blas import PLAIN, TRANSPOSED, gemm
from hpcml.kernels.cpu.functions import exp, row_dot, row_max, row_sum
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.random import HALF, LOW, keep_row, u4, u8
from hpcml.kernels.cpu.team import divided

TILE = 64  # queries
LANES = 16  # float32 in the widest vector


@inline
def _at(x: Any, b: int, h: int, t: int) -> Any:
    """Address of x[b, h, t]."""
    return x.ctypes.data + b * x.strides[0] + h * x.strides[1] + t * x.strides[2]


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), generate


@inline
def _row(x: Any, b: int, h: int, t: int) -> Any:
    """x[b, h, t] as what it is and numba does not know it to be: contiguous."""
    return carray(_pointer(_at(x, b, h, t)), (x.shape[3],), x.dtype)


@inline
def _scores(
    q: Any, k: Any, b: int, h: int, first: int, rows: int, keys: int, scale: Any, s: Any
) -> None:  # fmt: skip
    """s[:rows, :keys] = scale * q[first : first + rows] k[:keys]^T."""
    size, zero = q.itemsize, q.dtype.type(0)
    gemm(PLAIN, TRANSPOSED, rows, keys, q.shape[3], scale, _at(q, b, h, first),
         q.strides[2] // size, _at(k, b, h, 0), k.strides[2] // size, zero,
         s.ctypes.data, s.shape[1])  # fmt: skip


@inline
def _hide(row: Any, t: int, keys: int, causal: bool) -> Any:
    """Of a row of scores: how many keys query t sees, and the width for loops over them.

    The width is one of whole vectors; what it has beyond the keys that are seen gets a score of
    which the exponential is 0.
    """
    seen = min(t + 1, keys) if causal else keys
    width = min((seen + LANES - 1) // LANES * LANES, keys)
    for j in range(seen, width):
        row[j] = -np.inf
    return seen, width


@inline
def _drop(key: Any, sample: Any, h: int, t: int, s: int, n: int, threshold: Any, keep: Any) -> Any:
    """Make the mask of query t of a sample and head for n keys from s on.

    Return it, a part of `keep`, and the scale of what is kept.
    """
    low = u4(sample & LOW)
    head = u4(u8(h) ^ ((sample >> HALF) << u8(16)))
    mask = keep_row(key, u4(t), head, low, threshold, s, n, keep)
    return mask, keep.dtype.type(1.0 / (1.0 - threshold / 4294967296.0))


def _pairs(q: Any, k: Any, *_: Any) -> tuple[int, int]:
    """The pairs of a sample and a head, and the work of their products."""
    return q.shape[0] * q.shape[1], q.size * k.shape[2] // 16


@divided("void(R[:,:,:,:], R[:,:,:,:], R[:,:,:,:], T, boolean, uint64, uint64, uint32, int64,"
        " int64, int64, T[:,:,:,:], T[:,:,:])", _pairs)  # fmt: skip
def attention(
    q: Any, k: Any, v: Any, scale: Any, causal: bool, key: Any, first: Any, threshold: Any,
    head: int, row0: int, key0: int, out: Any, lse: Any, low: int, high: int,
) -> None:  # fmt: skip
    """out = dropout(softmax(scale q k^T)) v; lse (B, H, T) = log sum exp of each row's scores.

    `causal`: query t sees keys 0..t. Dropout has probability threshold / 2^32 and is a function of
    (key, sample first + b, head + h, query row0 + t, key key0 + s): the arrays may be a block of
    a longer sequence, and some of its heads.
    """
    _, heads, queries, depth = q.shape
    length, size = k.shape[2], q.itemsize
    one, zero = q.dtype.type(1), q.dtype.type(0)
    s = np.empty((TILE, length), q.dtype)
    keep = np.empty(length + 6, q.dtype)  # whole blocks of 4 words
    for pair in range(low, high):
        b, h = pair // heads, pair % heads
        for start in range(0, queries, TILE):
            rows = min(TILE, queries - start)
            keys = min(start + rows, length) if causal else length
            _scores(q, k, b, h, start, rows, keys, scale, s)
            for i in range(rows):
                row, t = s[i], start + i
                seen, width = _hide(row, t, keys, causal)
                most = row_max(row, 0, width)
                for j in range(width):
                    row[j] = exp(row[j] - most)
                total = row_sum(row, 0, width)
                lse[b, h, t] = most + math.log(total)
                factor = one / total
                if threshold > 0:
                    mask, kept = _drop(key, first + u8(b), head + h, row0 + t, key0, seen,
                                       threshold, keep)  # fmt: skip
                    factor *= kept
                    for j in range(seen):
                        row[j] *= mask[j]
                for j in range(width):
                    row[j] *= factor
                row[width:keys] = zero
            gemm(PLAIN, PLAIN, rows, depth, keys, one, s.ctypes.data, length,
                 _at(v, b, h, 0), v.strides[2] // size, zero, _at(out, b, h, start),
                 out.strides[2] // size)  # fmt: skip


def _outputs(out: Any, *_: Any) -> tuple[int, int]:
    """The pairs of a sample and a head, as above: a thread has the same ones."""
    return out.shape[0] * out.shape[1], out.size


@divided("void(T[:,:,:,:], T[:,:,:], R[:,:,:,:], R[:,:,:])", _outputs)
def join_attention(out: Any, lse: Any, other: Any, total: Any, low: int, high: int) -> None:
    """Make of attention to some keys (out, lse) that to these and others (other, total).

    A weighted mean of both, with the sums of exponentials as weights: sums over keys of softmax in
    blocks (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").
    """
    _, heads, queries, depth = out.shape
    for pair in range(low, high):
        b, h = pair // heads, pair % heads
        for t in range(queries):
            x, y = lse[b, h, t], total[b, h, t]
            most = max(x, y)
            first, second = exp(x - most), exp(y - most)
            both = first + second
            first, second = first / both, second / both
            lse[b, h, t] = most + math.log(both)
            row, more = _row(out, b, h, t), _row(other, b, h, t)
            for j in range(depth):
                row[j] = first * row[j] + second * more[j]


@divided("void(R[:,:,:,:], R[:,:,:,:], R[:,:,:,:], R[:,:,:,:], R[:,:,:], R[:,:,:,:], T, boolean,"
        " uint64, uint64, uint32, int64, int64, int64, boolean, T[:,:,:,:], T[:,:,:,:],"
        " T[:,:,:,:])", _pairs)  # fmt: skip
def attention_backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any, scale: Any, causal: bool,
    key: Any, first: Any, threshold: Any, head: int, row0: int, key0: int, more: bool,
    dq: Any, dk: Any, dv: Any, low: int, high: int,
) -> None:  # fmt: skip
    """Gradients of `attention` with respect to q, k, v for the output's gradient g (B, H, T, D).

    `more`: they are added to what dq, dk and dv hold. Where k and v are a block of the keys, out
    and lse are those of attention to all of them, and the gradients what this block contributes.
    """
    _, heads, queries, depth = q.shape
    length, size = k.shape[2], q.itemsize
    one, zero = q.dtype.type(1), q.dtype.type(0)
    before = one if more else zero
    p, ds = np.empty((TILE, length), q.dtype), np.empty((TILE, length), q.dtype)
    keep = np.empty(length + 6, q.dtype)  # whole blocks of 4 words
    ldq, ldk, ldv = q.strides[2] // size, k.strides[2] // size, v.strides[2] // size
    ldg = g.strides[2] // size
    lddq, lddk, lddv = dq.strides[2] // size, dk.strides[2] // size, dv.strides[2] // size
    for pair in range(low, high):
        b, h = pair // heads, pair % heads
        # Keys that no query sees have a gradient of zero.
        for t in range(min(queries, length) if causal or queries == 0 else length, length):
            if not more:
                dk[b, h, t, :] = zero
                dv[b, h, t, :] = zero
        # Last tile first: it reaches all keys, so it can overwrite dk and dv, the others add.
        for start in range((queries - 1) // TILE * TILE, -1, -TILE):
            rows = min(TILE, queries - start)
            keys = min(start + rows, length) if causal else length
            add = before if start + TILE >= queries else one
            _scores(q, k, b, h, start, rows, keys, scale, p)
            gemm(PLAIN, TRANSPOSED, rows, keys, depth, one, _at(g, b, h, start), ldg,
                 _at(v, b, h, 0), ldv, zero, ds.ctypes.data, length)  # fmt: skip
            for i in range(rows):
                t = start + i
                prob, grad, shift = p[i], ds[i], lse[b, h, t]
                seen, width = _hide(prob, t, keys, causal)
                delta = row_dot(_row(g, b, h, t), _row(out, b, h, t), depth)
                for j in range(width):
                    prob[j] = exp(prob[j] - shift)
                if threshold > 0:
                    mask, factor = _drop(key, first + u8(b), head + h, row0 + t, key0, seen,
                                         threshold, keep)  # fmt: skip
                    for j in range(seen):
                        kept = mask[j] * factor
                        grad[j] = prob[j] * (grad[j] * kept - delta) * scale
                        prob[j] *= kept
                else:
                    for j in range(width):
                        grad[j] = prob[j] * (grad[j] - delta) * scale
                prob[seen:keys] = zero
                grad[seen:keys] = zero
            gemm(PLAIN, PLAIN, rows, depth, keys, one, ds.ctypes.data, length,
                 _at(k, b, h, 0), ldk, before, _at(dq, b, h, start), lddq)  # fmt: skip
            gemm(TRANSPOSED, PLAIN, keys, depth, rows, one, ds.ctypes.data, length,
                 _at(q, b, h, start), ldq, add, _at(dk, b, h, 0), lddk)  # fmt: skip
            gemm(TRANSPOSED, PLAIN, keys, depth, rows, one, p.ctypes.data, length,
                 _at(g, b, h, start), ldg, add, _at(dv, b, h, 0), lddv)  # fmt: skip
