"""Attention by cuDNN, else in tiles (`attention.cu`), or array expressions for heads too large.

q (B, H, T, D), k, v (B, H, S, D), gradients and results may be views into larger arrays as long as
the last dimension is contiguous.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.backend import Array, xp
from hpcml.kernels import generic
from hpcml.kernels.cuda import cudnn
from hpcml.kernels.cuda.launch import WARP, launch, share, sum_type

TILES, _QUERIES = "attention.cu", "queries.cu"
_ROWS, _COLUMNS, _THREADS = 64, 32, 128  # as in the source
DEPTHS = (32, 64, 128)
"""Sizes of heads that tiles are compiled for; smaller ones take the next."""
MOST_SHARED = 163 << 10
"""No more bytes of shared memory are asked for, as compute capability 8.0 has them; others have
from 99 KiB on ("CUDA C++ Programming Guide", technical specifications)."""
FIXED = 2 * _COLUMNS * 8
"""Bytes of shared memory that a kernel has beside its tiles, at most."""

_log = logging.getLogger("hpcml")

STRIDES = np.dtype([(name, np.int64) for name in "bht"])
SHAPE = np.dtype(
    [(name, np.int64) for name in (
        "heads", "queries", "keys", "depth", "causal", "head", "row0", "key0",
    )] + [("key", np.uint64), ("first", np.uint64), ("threshold", np.int64)]
)  # fmt: skip


@functools.cache
def _most_shared(device: int) -> int:
    """Bytes of shared memory that a block can have on a device, if its kernel asks for them."""
    found = backend.device_module("cuda").cuda.Device(device).attributes
    return min(int(found["MaxSharedMemoryPerBlockOptin"]), MOST_SHARED)


def takes(depth: int, dtype: np.dtype[Any], device: int = 0) -> bool:
    """Whether heads of this size are computed in tiles on a device."""
    return 0 < needed(_depth(depth), dtype) <= _most_shared(device)


def _in_tiles(q: Array) -> bool:
    """Whether attention of these queries is computed in tiles; the first time not, a line says so.

    That holds for each size and type of heads.
    """
    depth, dtype, device = q.shape[3], q.dtype, q.device.id
    return takes(depth, dtype, device) or _too_large(depth, dtype.name)


@functools.cache
def _too_large(depth: int, dtype: str) -> bool:
    _log.warning(
        "attention by array expressions, in memory for all scores: heads of %d in %s are too large "
        "for tiles",
        depth, dtype,
    )  # fmt: skip
    return False


def needed(depth: int, dtype: np.dtype[Any]) -> int:
    """Bytes of shared memory that tiles of this depth take; none for no depth."""
    return _shared(depth, dtype, 2) + FIXED if depth else 0


def _depth(depth: int) -> int:
    return next((d for d in DEPTHS if depth <= d), 0)


def _shared(depth: int, dtype: np.dtype[Any], sides: int) -> int:
    """Bytes for tiles of so many arrays of the own side, and two of the other."""
    pitch = depth + 16 // dtype.itemsize
    return (sides * _ROWS + 2 * _COLUMNS) * pitch * dtype.itemsize


def _strides(x: Array) -> Any:
    size = x.dtype.itemsize
    return np.array(tuple(stride // size for stride in x.strides[:3]), STRIDES)


def _start(name: str, q: Array, rows: int, arrays: tuple[Any, ...], *more: Any, sides: int) -> None:
    batch, heads, _, depth = q.shape
    launch(
        TILES, name, q, (-(-rows // _ROWS) * batch * heads,), (_THREADS,), *arrays, *more,
        depth=_depth(depth), shared=_shared(_depth(depth), q.dtype, sides),
    )  # fmt: skip


def _shape(q: Array, k: Array, causal: bool, mask: tuple[Any, ...]) -> Any:
    key, first, threshold, head, row0, key0 = (int(number) for number in mask)
    _, heads, queries, depth = q.shape
    return np.array(
        (heads, queries, k.shape[2], depth, causal, head, row0, key0, key, first, threshold), SHAPE
    )


def attention(
    q: Array, k: Array, v: Array, scale: float, causal: bool, key: int, first: int, threshold: int,
    head: int, row0: int, key0: int, out: Array, lse: Array,
) -> None:  # fmt: skip
    """out = dropout(softmax(scale q k^T)) v; lse (B, H, T) = log sum exp; see `cpu`."""
    if cudnn.attention(q, k, v, scale, causal, threshold, out, lse):
        return
    mask = key, first, threshold, head, row0, key0
    if not _in_tiles(q):
        generic.attention(q, k, v, scale, causal, *mask, out, lse)
        return
    sums = lse if lse.flags.c_contiguous else share(lse.shape, lse, lse.dtype)
    _start(
        "attention", q, q.shape[2], (q, k, v, out, sums), *map(_strides, (q, k, v, out)),
        _shape(q, k, causal, mask), sum_type(q).type(scale), sides=1,
    )  # fmt: skip
    if sums is not lse:
        lse[...] = sums


def _over_queries(name: str, q: Array, *args: Any) -> None:
    """Start a kernel with a warp for each query."""
    batch, heads, queries, depth = q.shape
    sizes = np.int64(heads), np.int64(queries), np.int64(depth)
    blocks = -(-queries * WARP // _THREADS) * batch * heads
    launch(_QUERIES, name, q, (blocks,), (_THREADS,), *args, *sizes)


def join_attention(out: Array, lse: Array, other: Array, total: Array) -> None:
    """Make of attention to some keys (out, lse) that to these and others (other, total)."""
    sums, total = xp(lse).ascontiguousarray(lse), xp(lse).ascontiguousarray(total)
    _over_queries("join_attention", out, out, sums, other, total, *map(_strides, (out, other)))
    if sums is not lse:
        lse[...] = sums


def attention_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, g: Array, scale: float, causal: bool,
    key: int, first: int, threshold: int, head: int, row0: int, key0: int, more: bool,
    dq: Array, dk: Array, dv: Array,
) -> None:  # fmt: skip
    """Gradients of `attention` with respect to q, k, v for the output's gradient g; see `cpu`."""
    if cudnn.attention_backward(
        q, k, v, out, lse, g, scale, causal, threshold, more, dq, dk, dv
    ):  # fmt: skip
        return
    mask = key, first, threshold, head, row0, key0
    if not _in_tiles(q):
        generic.attention_backward(
            q, k, v, out, lse, g, scale, causal, *mask, more, dq, dk, dv
        )  # fmt: skip
        return
    lse, delta = xp(lse).ascontiguousarray(lse), share(q.shape[:3], q, sum_type(q))
    _over_queries("attention_delta", q, g, out, delta, _strides(g), _strides(out))
    read = q, k, v, g, lse, delta
    strides = tuple(map(_strides, (q, k, v, g)))
    last = _shape(q, k, causal, mask), sum_type(q).type(scale), np.bool_(more)
    _start(
        "attention_queries", q, q.shape[2], (*read, dq), *strides, _strides(dq), *last, sides=2
    )  # fmt: skip
    _start(
        "attention_keys", q, k.shape[2], (*read, dk, dv), *strides, *map(_strides, (dk, dv)),
        *last, sides=2,
    )  # fmt: skip
