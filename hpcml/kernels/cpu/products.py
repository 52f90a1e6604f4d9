"""Matrix products, straight into given memory: those of a linear layer, and any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.kernels.cpu.blas import PLAIN, TRANSPOSED, gemm
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

_SPEED = 32
"""Multiplications and additions of a product in the time of one of `team`'s units of work."""


def _rows(x: Any, weight: Any, *_: Any) -> tuple[int, int]:
    return x.shape[0], weight.size * x.shape[0] // _SPEED


def _outputs(g: Any, x: Any, out: Any) -> tuple[int, int]:
    return g.shape[1], out.size * g.shape[0] // _SPEED


def _all_rows(a: Any, b: Any, out: Any) -> tuple[int, int]:
    return out.shape[0] * out.shape[1], out.size * a.shape[2] // _SPEED


@divided("void(R[:, ::1], R[:, ::1], R[::1], T[:, ::1])", _rows, ranges=1)
def linear(x: Any, weight: Any, bias: Any, out: Any, low: int, high: int) -> None:
    """out = x weight^T + bias: x (rows, in), weight (out, in), bias (out) or empty for none."""
    x, out = x[low:high], out[low:high]
    (rows, n), m = x.shape, weight.shape[0]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or m == 0:  # BLAS refuses leading dimensions of 0
        out[:, :] = zero
    else:
        gemm(PLAIN, TRANSPOSED, rows, m, n, one, x.ctypes.data, n, weight.ctypes.data, n, zero,
             out.ctypes.data, m)  # fmt: skip
    if bias.size > 0:
        for r in range(rows):
            for j in range(m):
                out[r, j] += bias[j]


@divided("void(R[:, ::1], R[:, ::1], T[:, ::1])", _rows, ranges=1)
def linear_input_gradient(g: Any, weight: Any, out: Any, low: int, high: int) -> None:
    """out = g weight: g (rows, out), weight (out, in), out (rows, in)."""
    g, out = g[low:high], out[low:high]
    (rows, m), n = g.shape, weight.shape[1]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or m == 0:
        out[:, :] = zero
        return
    gemm(PLAIN, PLAIN, rows, n, m, one, g.ctypes.data, m, weight.ctypes.data, n, zero,
         out.ctypes.data, n)  # fmt: skip


@divided("void(R[:, ::1], R[:, ::1], T[:, ::1])", _outputs, ranges=1)
def linear_weight_gradient(g: Any, x: Any, out: Any, low: int, high: int) -> None:
    """out = g^T x: g (rows, out), x (rows, in), out (out, in)."""
    out = out[low:high]
    (rows, m), n = g.shape, x.shape[1]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or low == high:
        out[:, :] = zero
        return
    gemm(TRANSPOSED, PLAIN, high - low, n, rows, one, g.ctypes.data + low * g.itemsize, m,
         x.ctypes.data, n, zero, out.ctypes.data, n)  # fmt: skip


def matmul(a: Any, b: Any, out: Any) -> None:
    """out = a b, over the last two dimensions; the others are broadcast. `out` is contiguous."""
    batch = out.shape[:-2]
    if b.ndim == 2:  # one matrix for all: their rows are those of one matrix
        batch, a, out = (), _as_one(a), _as_one(out)
    a, b = (np.broadcast_to(x, batch + x.shape[-2:]) for x in (a, b))
    count = math.prod(batch)
    a, b, out = (x.reshape(count, *x.shape[-2:]) for x in (a, b, out))
    _matmul(_for_blas(a), _for_blas(b), out)


def _as_one(x: Any) -> Any:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _for_blas(x: Any) -> Any:
    """x, or a copy of it if the elements of neither its rows nor its columns lie side by side."""
    (_, m, n), (_, down, along), size = x.shape, x.strides, x.itemsize
    fits = (along == size and down >= n * size) or (down == size and along >= m * size)
    return x if fits and x.flags.behaved else x.copy()


@inline
def _layout(x: Any) -> Any:
    """Whether a matrix is transposed, and its leading dimension."""
    size = x.itemsize
    if x.strides[2] == size and x.strides[1] >= x.shape[2] * size:
        return PLAIN, max(x.strides[1] // size, 1)
    return TRANSPOSED, max(x.strides[2] // size, 1)


@divided("void(R[:, :, :], R[:, :, :], T[:, :, ::1])", _all_rows, ranges=1)
def _matmul(a: Any, b: Any, out: Any, low: int, high: int) -> None:
    """out[k] = a[k] b[k]; a row is one of any of the matrices `out`."""
    (_, m, n), depth = out.shape, a.shape[2]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    (ta, lda), (tb, ldb) = _layout(a), _layout(b)
    while low < high:
        k, first = low // m, low % m
        rows = min(m - first, high - low)
        if depth == 0 or n == 0:
            out[k, first : first + rows, :] = zero
        else:
            start = a.ctypes.data + k * a.strides[0] + first * a.strides[1]
            gemm(ta, tb, rows, n, depth, one, start, lda, b.ctypes.data + k * b.strides[0], ldb,
                 zero, out.ctypes.data + low * n * out.itemsize, n)  # fmt: skip
        low += rows
