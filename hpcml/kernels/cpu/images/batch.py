"""Batch normalisation of rows: moments and sums over columns, and what is done with them.

Sums are over blocks of rows that stay in the cache, then over blocks in float64 and in order: they
are accurate, and the same for any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.team import divided, rows

_BLOCK = 1 << 15
"""Elements of a block of rows, at most: it stays in the cache."""
_MOST = 256
"""Rows of a block, at most: so many are added in the precision of the elements."""


def batch_moments(x: Any, mean: Any, variance: Any) -> None:
    """Mean and variance of each column of x (M, C), M at least 1."""
    block = _rows_of(x)
    means = np.empty((-(-x.shape[0] // block), x.shape[1]), x.dtype)
    squares = np.empty_like(means)
    _block_moments(means, squares, x, block)
    sizes = np.full(len(means), block, np.float64)
    sizes[-1] = x.shape[0] - block * (len(means) - 1)
    # Two sums of squared deviations are joined as in Chan, Golub and LeVeque 1983, equation 2.1.
    whole = sizes @ means / x.shape[0]
    mean[...] = whole
    variance[...] = (squares.sum(0, np.float64) + sizes @ (means - whole) ** 2) / x.shape[0]


def batch_norm_sums(g: Any, x: Any, mean: Any, sums: Any) -> None:
    """sums = the column sums of g and of g (x - mean)."""
    block = _rows_of(x)
    parts = np.empty((-(-x.shape[0] // block), 2, x.shape[1]), x.dtype)
    _block_sums(parts, g, x, mean, block)
    sums[...] = parts.sum(0, np.float64)


def _rows_of(x: Any) -> int:
    return min(max(_BLOCK // max(int(x.shape[1]), 1), 1), _MOST)


def _blocks(parts: Any, other: Any, x: Any, *_: Any) -> tuple[int, int]:
    return parts.shape[0], x.size


@divided("void(T[:, ::1], T[:, ::1], R[:, ::1], int64)", _blocks)
def _block_moments(
    means: Any, squares: Any, x: Any, block: int, low: int, high: int
) -> None:  # fmt: skip
    """Mean, and sum of squared deviations from it, of the columns of each block of rows."""
    for b in range(low, high):
        mean, square = means[b], squares[b]
        mean[:] = x.dtype.type(0)
        square[:] = x.dtype.type(0)
        begin, end = b * block, min((b + 1) * block, x.shape[0])
        for r in range(begin, end):
            row = x[r]
            for j in range(row.size):
                mean[j] += row[j]
        count = x.dtype.type(end - begin)
        for j in range(mean.size):
            mean[j] /= count
        for r in range(begin, end):
            row = x[r]
            for j in range(row.size):
                square[j] += (row[j] - mean[j]) * (row[j] - mean[j])


@divided("void(T[:, :, ::1], R[:, ::1], R[:, ::1], R[::1], int64)", _blocks)
def _block_sums(parts: Any, g: Any, x: Any, mean: Any, block: int, low: int, high: int) -> None:
    """Column sums of g and of g (x - mean) over each block of rows."""
    for b in range(low, high):
        plain, weighted = parts[b, 0], parts[b, 1]
        plain[:] = x.dtype.type(0)
        weighted[:] = x.dtype.type(0)
        for r in range(b * block, min((b + 1) * block, x.shape[0])):
            row, gradient = x[r], g[r]
            for j in range(row.size):
                plain[j] += gradient[j]
            for j in range(row.size):
                weighted[j] += gradient[j] * (row[j] - mean[j])


@divided("void(R[:, ::1], R[::1], R[::1], R[::1], T[:, ::1])", rows)
def batch_norm(
    x: Any, mean: Any, scale: Any, shift: Any, out: Any, low: int, high: int
) -> None:  # fmt: skip
    """out = (x - mean) scale + shift, by column."""
    for r in range(low, high):
        row, y = x[r], out[r]
        for j in range(row.size):
            y[j] = (row[j] - mean[j]) * scale[j] + shift[j]


@divided("void(R[:, ::1], R[:, ::1], R[::1], R[::1], R[:, ::1], R[:, ::1], T[:, ::1])", rows)
def batch_norm_backward(
    g: Any, x: Any, mean: Any, scale: Any, slopes: Any, pending: Any, out: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """out = pending + scale (g - slopes[0] - slopes[1] (x - mean)), by column.

    pending (M, C), or no rows for none: what the gradient of x has got from elsewhere.
    """
    base, slope = slopes[0], slopes[1]
    scratch = np.empty(x.shape[1], x.dtype)
    for r in range(low, high):
        row, gradient, y = x[r], g[r], out[r]
        for j in range(row.size):
            scratch[j] = gradient[j] - (row[j] - mean[j]) * slope[j]
        if pending.shape[0] == 0:
            for j in range(row.size):
                y[j] = (scratch[j] - base[j]) * scale[j]
        else:
            before = pending[r]
            for j in range(row.size):
                y[j] = before[j] + (scratch[j] - base[j]) * scale[j]
