"""The products of a linear layer of bfloat16, where a BLAS multiplies such matrices as they are.

Names and arguments are those of the kernels for float32. Arrays are words of 16 bits: numba has no
bfloat16. Sums are in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.blas import PLAIN, TRANSPOSED, gemm_brain
from hpcml.kernels.cpu.halves import from_bfloat16, narrow_all
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

_SPEED = 128
"""Multiplications and additions of a product in the time of one of `team`'s units of work."""
_TILE = 256  # rows that are multiplied at once, then rounded


def _rows(x: Any, weight: Any, *_: Any) -> tuple[int, int]:
    return x.shape[0], weight.size * x.shape[0] // _SPEED


def _outputs(g: Any, x: Any, out: Any) -> tuple[int, int]:
    return g.shape[1], out.size * g.shape[0] // _SPEED


@inline
def _tile(rows: int, columns: int) -> Any:
    return np.empty((min(rows, _TILE), columns), np.float32)


@divided("void(H[:, ::1], H[:, ::1], H[::1], uint16[:, ::1])", _rows, ranges=1)
def linear(x: Any, weight: Any, bias: Any, out: Any, low: int, high: int) -> None:
    """out = x weight^T + bias: x (rows, in), weight (out, in), bias (out) or empty for none."""
    n, m = x.shape[1], weight.shape[0]
    tile = _tile(high - low, m)
    for start in range(low, high, _TILE):
        rows = min(_TILE, high - start)
        if n == 0 or m == 0:
            tile[:, :] = np.float32(0)
        else:
            gemm_brain(PLAIN, TRANSPOSED, rows, m, n, x[start:].ctypes.data, n,
                       weight.ctypes.data, n, tile.ctypes.data, m)  # fmt: skip
        if bias.size > 0:
            for r in range(rows):
                for j in range(m):
                    tile[r, j] += from_bfloat16(bias[j])
        for r in range(rows):
            narrow_all(tile[r], out[start + r], True)


@divided("void(H[:, ::1], H[:, ::1], uint16[:, ::1])", _rows, ranges=1)
def linear_input_gradient(g: Any, weight: Any, out: Any, low: int, high: int) -> None:
    """out = g weight: g (rows, out), weight (out, in), out (rows, in)."""
    m, n = weight.shape
    tile = _tile(high - low, n)
    for start in range(low, high, _TILE):
        rows = min(_TILE, high - start)
        if n == 0 or m == 0:
            tile[:, :] = np.float32(0)
        else:
            gemm_brain(PLAIN, PLAIN, rows, n, m, g[start:].ctypes.data, m,
                       weight.ctypes.data, n, tile.ctypes.data, n)  # fmt: skip
        for r in range(rows):
            narrow_all(tile[r], out[start + r], True)


@divided("void(H[:, ::1], H[:, ::1], uint16[:, ::1])", _outputs, ranges=1)
def linear_weight_gradient(g: Any, x: Any, out: Any, low: int, high: int) -> None:
    """out = g^T x: g (rows, out), x (rows, in), out (out, in)."""
    (rows, m), n = g.shape, x.shape[1]
    tile = _tile(high - low, n)
    for start in range(low, high, _TILE):
        outputs = min(_TILE, high - start)
        if rows == 0 or n == 0:
            tile[:, :] = np.float32(0)
        else:
            gemm_brain(TRANSPOSED, PLAIN, outputs, n, rows, g.ctypes.data + start * g.itemsize, m,
                       x.ctypes.data, n, tile.ctypes.data, n)  # fmt: skip
        for r in range(outputs):
            narrow_all(tile[r], out[start + r], True)
