"""Products of matrices by cuBLAS, straight into given memory; sums in float32 beside 16 bits.

Matrices are handed over where they lie, transposed or with longer rows: nothing is copied unless
the elements of neither its rows nor its columns lie side by side.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from hpcml.backend import Array, xp
from hpcml.kernels.cuda.launch import sum_type

_NUMBERS = {dtype: np.arange(2, dtype=dtype) for dtype in ("float32", "float64")}
"""0 and 1 of the types of sums, for cuBLAS to read at any time."""


class _Library(NamedTuple):
    """cuBLAS, and how it calls types of elements and of sums."""

    cublas: Any
    device: Any
    types: dict[str, int]
    sums: dict[str, int]


@functools.cache
def _library(module: ModuleType) -> _Library:
    from cupy_backends.cuda.libs import cublas

    runtime = module.cuda.runtime
    types = {"float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
             "float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF}  # fmt: skip
    sums = {"float32": cublas.CUBLAS_COMPUTE_32F, "float64": cublas.CUBLAS_COMPUTE_64F}
    return _Library(cublas, module.cuda.device, types, sums)


class _Layout(NamedTuple):
    """How a matrix lies in memory: row after row, or column after column (turned)."""

    turned: bool
    leading: int


def _layout(x: Array) -> _Layout | None:
    m, n = x.shape[-2:]
    size = x.dtype.itemsize
    down, across = x.strides[-2:]
    if (across == size or n == 1) and (down >= n * size or m == 1):
        return _Layout(False, max(down // size, n, 1))
    if (down == size or m == 1) and (across >= m * size or n == 1):
        return _Layout(True, max(across // size, m, 1))
    return None


def _ready(x: Array) -> tuple[Array, _Layout]:
    layout = _layout(x)
    if layout is None:
        x = x.copy()
        layout = _layout(x)
    assert layout is not None
    return x, layout


def product(a: Array, b: Array, out: Array, add: bool = False) -> None:
    """out = a b, or out += a b; a (..., m, k), b (..., k, n), of two or three dimensions.

    out, whose rows are contiguous, may be of the type of sums where a and b have 16 bits.
    """
    (m, k), n = a.shape[-2:], b.shape[-1]
    if not out.size:
        return
    if not k:
        if not add:
            out.fill(0)
        return
    (a, of_a), (b, of_b), of_out = _ready(a), _ready(b), _layout(out)
    assert of_out is not None and not of_out.turned, "the result is written row after row"
    library, sums = _library(xp(out)), sum_type(a).name
    one = _NUMBERS[sums][1:].ctypes.data
    old = one if add else _NUMBERS[sums].ctypes.data
    # cuBLAS has columns where we have rows: it computes the transpose, b^T a^T.
    types = [library.types[x.dtype.name] for x in (b, a, out)]
    batches = [[]] * 3 if out.ndim == 2 else [[x.strides[0] // x.itemsize] for x in (b, a, out)]
    handle = library.device.get_cublas_handle()
    arguments = [
        handle, int(of_b.turned), int(of_a.turned), n, m, k, one,
        b.data.ptr, types[0], of_b.leading, *batches[0],
        a.data.ptr, types[1], of_a.leading, *batches[1], old,
        out.data.ptr, types[2], of_out.leading, *batches[2],
    ]  # fmt: skip
    last = library.sums[sums], library.cublas.CUBLAS_GEMM_DEFAULT
    if out.ndim == 2:
        library.cublas.gemmEx(*arguments, *last)
    else:
        library.cublas.gemmStridedBatchedEx(*arguments, len(out), *last)


def linear(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """out = x weight^T + bias; empty bias for none."""
    if bias.size:
        out[...] = bias  # added to in the type of sums, and rounded once
    product(x, weight.T, out, add=bool(bias.size))


def linear_input_gradient(g: Array, weight: Array, out: Array) -> None:
    """out = g weight."""
    product(g, weight, out)


def linear_weight_gradient(g: Array, x: Array, out: Array) -> None:
    """out = g^T x."""
    product(g.T, x, out)


def matmul(a: Array, b: Array, out: Array) -> None:
    """out = a b, over the last two dimensions; the others are broadcast. `out` is contiguous."""
    batch = out.shape[:-2]
    if b.ndim == 2:  # one matrix for all: their rows are those of one matrix
        product(_as_one(a), b, _as_one(out))
        return
    m, count = xp(out), math.prod(batch)
    a, b = (m.broadcast_to(x, batch + x.shape[-2:]) for x in (a, b))
    a, b, out = (x.reshape(count, *x.shape[-2:]) for x in (a, b, out))
    product(a, b, out)


def _as_one(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
