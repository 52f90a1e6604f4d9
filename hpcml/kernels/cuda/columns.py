"""Sums over the columns of a matrix, in chunks of rows whose number depends on its shape alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.kernels.cuda.launch import WARP, aligned, launch, share, sum_type

_SOURCE = "columns.cu"
_LINES = 8  # threads that share a column within a block
_CHUNKS = 64  # at most
_ROWS = 64  # of a chunk, at least


def column_sums(x: Array, out: Array) -> None:
    """out[j] = sum of x[r, j]."""
    _finish(_parts("column_parts", x, (x,)), x, out)


def layer_norm_weight_gradient(g: Array, x: Array, mean: Array, inverse: Array, out: Array) -> None:
    """out[j] = sum over rows of g * (x - mean) * inverse."""
    _finish(_parts("product_parts", x, (g, x), mean, inverse, np.bool_(True)), x, out)


def column_means(x: Array, out: Array) -> None:
    """out[j] = mean of x[:, j]; out is of the type of sums."""
    _finish_wide(_parts("column_parts", x, (x,)), x, 1 / x.shape[0], out)


def column_variances(x: Array, mean: Array, out: Array) -> None:
    """out[j] = mean of (x[:, j] - mean[j])^2; mean and out are of the type of sums."""
    _finish_wide(_parts("deviation_parts", x, (x,), mean), x, 1 / x.shape[0], out)


def column_products(g: Array, x: Array, mean: Array, out: Array) -> None:
    """out[j] = sum of g[:, j] (x[:, j] - mean[j]); mean and out are of the type of sums."""
    parts = _parts("product_parts", x, (g, x), mean, mean, np.bool_(False))
    _finish_wide(parts, x, 1.0, out)


def wide_column_sums(x: Array, out: Array) -> None:
    """out[j] = sum of x[:, j]; out is of the type of sums."""
    _finish_wide(_parts("column_parts", x, (x,)), x, 1.0, out)


def _parts(name: str, x: Array, arrays: tuple[Array, ...], *more: Any) -> Array:
    """The sums of each chunk of rows."""
    rows, n = x.shape
    chunk = max(_ROWS, -(-rows // _CHUNKS))
    chunks = -(-rows // chunk)
    pack = 16 // x.dtype.itemsize
    packed = n % pack == 0 and aligned(*arrays)
    parts = share((chunks, n), x, sum_type(x))
    wide = WARP * (pack if packed else 1)
    launch(
        _SOURCE, name, x, (-(-n // wide), chunks), (WARP, _LINES),
        *arrays, *more, np.int64(rows), np.int64(n), np.int64(chunk), np.bool_(packed), parts,
    )  # fmt: skip
    return parts


def _finish(parts: Array, like: Array, out: Array) -> None:
    chunks, n = parts.shape
    launch(
        _SOURCE, "column_finish", like, (-(-n // 256),), (256,),
        parts, np.int64(chunks), np.int64(n), out,
    )  # fmt: skip


def _finish_wide(parts: Array, like: Array, factor: float, out: Array) -> None:
    chunks, n = parts.shape
    launch(
        _SOURCE, "column_finish_wide", like, (-(-n // 256),), (256,),
        parts, np.int64(chunks), np.int64(n), sum_type(like).type(factor), out,
    )  # fmt: skip
