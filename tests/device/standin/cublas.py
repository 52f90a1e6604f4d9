"""The stand-in's cuBLAS: products by NumPy on the pointers and strides that it is given."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np

from tests.device.standin import streams

_TYPES: dict[int, Any] = {0: np.float32, 1: np.float64, 2: np.float16, 14: "bfloat16"}
_SUMS = {68: np.float32, 70: np.float64}


def _matrix(pointer: int, kind: int, rows: int, columns: int, leading: int) -> np.ndarray[Any, Any]:
    """A matrix that lies column after column, as cuBLAS has them."""
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if kind == 14 else _TYPES[kind])
    assert leading >= max(rows, 1), f"leading dimension {leading} of {rows} rows"
    count = leading * (columns - 1) + rows
    raw = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(pointer)
    size = dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        np.frombuffer(raw, dtype), (rows, columns), (size, leading * size)
    )


def _scalar(address: int, kind: int) -> float:
    dtype = np.dtype(_SUMS[kind])
    raw = (ctypes.c_ubyte * dtype.itemsize).from_address(address)
    return float(np.frombuffer(raw, dtype)[0])


def _gemm(
    ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, at: int, lda: int,
    b: int, bt: int, ldb: int, beta: int, c: int, ct: int, ldc: int, compute: int,
) -> None:  # fmt: skip
    x = _matrix(a, at, *((k, m) if ta else (m, k)), lda)
    y = _matrix(b, bt, *((n, k) if tb else (k, n)), ldb)
    z = _matrix(c, ct, m, n, ldc)
    for matrix in x, y, z:
        streams.touch(matrix, matrix is z)
    assert at == bt and (ct == at or (ct == 0 and at in (2, 14))), (at, bt, ct)
    sums = np.float64 if compute == 70 else np.float32
    assert (sums == np.float64) == (at == 1)
    wide = (x.T if ta else x).astype(sums) @ (y.T if tb else y).astype(sums)
    wide *= _scalar(alpha, compute)
    old = _scalar(beta, compute)
    if old:
        wide += old * z.astype(sums)
    z[...] = wide


class Cublas(types.ModuleType):
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT = 68, 70, -1

    @staticmethod
    def gemmEx(
        handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
        a: int, at: int, lda: int, b: int, bt: int, ldb: int, beta: int,
        c: int, ct: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        """C = alpha op(A) op(B) + beta C."""
        _gemm(ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute)

    @staticmethod
    def gemmStridedBatchedEx(
        handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
        a: int, at: int, lda: int, sa: int, b: int, bt: int, ldb: int, sb: int, beta: int,
        c: int, ct: int, ldc: int, sc: int, count: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        """The same for matrices at constant distances, in elements."""
        sizes = [2 if kind in (2, 14) else 4 if kind == 0 else 8 for kind in (at, bt, ct)]
        for i in range(count):
            ai, bi, ci = (
                p + i * s * size for p, s, size in zip((a, b, c), (sa, sb, sc), sizes, strict=True)
            )
            _gemm(ta, tb, m, n, k, alpha, ai, at, lda, bi, bt, ldb, beta, ci, ct, ldc, compute)
