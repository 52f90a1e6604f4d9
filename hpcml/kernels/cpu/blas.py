"""GEMM inside compiled code: the routine of the BLAS that NumPy has loaded, called by address.

The address is registered under a name of our own, so that compiled code on disk stays valid
whatever BLAS the next process finds. Where none is found a plain loop takes its place.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import threadpoolctl
from llvmlite import binding as llvm
from numba import carray, cfunc, types
from numba.extending import overload

ROW_MAJOR, PLAIN, TRANSPOSED = np.int32(101), np.int32(111), np.int32(112)  # from cblas.h

# NumPy's wheels, conda's and Debian's ILP64 builds, then LP64. An LP64 routine reads the lower half
# of each 64-bit argument, which the calling conventions of Linux on x86-64 and AArch64 allow.
_NAMES = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_", "cblas_{}gemm_64", "cblas_{}gemm")


def _signature(real: Any) -> Any:
    order, size, address = types.int32, types.int64, types.intp
    return types.void(
        order, order, order, size, size, size,
        real, address, size, address, size, real, address, size,
    )  # fmt: skip


_sgemm = types.ExternalFunction("hpcml_sgemm", _signature(types.float32))
_dgemm = types.ExternalFunction("hpcml_dgemm", _signature(types.float64))


def gemm(ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any, ldb: Any,
         beta: Any, c: Any, ldc: Any) -> None:  # fmt: skip
    """C = alpha op(A) op(B) + beta C, row-major, A, B, C given by address (BLAS's xGEMM)."""
    raise AssertionError("compiled code only")


@overload(gemm)
def _gemm(ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any, ldb: Any,
          beta: Any, c: Any, ldc: Any) -> Any:  # fmt: skip
    routine = _sgemm if alpha == types.float32 else _dgemm

    def call(ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any,
             ldb: Any, beta: Any, c: Any, ldc: Any) -> None:  # fmt: skip
        routine(ROW_MAJOR, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)

    return call


def _plain_gemm(real: Any) -> Any:
    """Compile the loop that stands in for a BLAS that cannot be found."""
    dtype = np.float32 if real == types.float32 else np.float64
    pointer = types.CPointer(real)
    order, size = types.int32, types.int64
    signature = types.void(
        order, order, order, size, size, size,
        real, pointer, size, pointer, size, real, pointer, size,
    )  # fmt: skip

    @cfunc(signature, error_model="numpy")
    def routine(order: Any, ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any,
                b: Any, ldb: Any, beta: Any, c: Any, ldc: Any) -> None:  # fmt: skip
        a_rows, b_rows = (k if ta == TRANSPOSED else m), (n if tb == TRANSPOSED else k)
        A, B = carray(a, (a_rows, lda), dtype), carray(b, (b_rows, ldb), dtype)
        C = carray(c, (m, ldc), dtype)
        for i in range(m):
            for j in range(n):
                C[i, j] = beta * C[i, j] if beta != 0 else dtype(0)
            for p in range(k):
                factor = alpha * (A[p, i] if ta == TRANSPOSED else A[i, p])
                for j in range(n):
                    C[i, j] += factor * (B[j, p] if tb == TRANSPOSED else B[p, j])

    return routine


def _find(letter: str) -> int | None:
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] != "blas":
            continue
        handle = ctypes.CDLL(library["filepath"])
        for name in _NAMES:
            try:
                function = getattr(handle, name.format(letter))
            except AttributeError:
                continue
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


@functools.cache
def register() -> dict[str, bool]:
    """Make the GEMM symbols known to compiled code; say for each letter whether BLAS was found."""
    found = {}
    for letter, real in (("s", types.float32), ("d", types.float64)):
        address = _find(letter)
        found[letter] = address is not None
        if address is None:
            _stand_ins.append(_plain_gemm(real))
            address = _stand_ins[-1].address
        llvm.add_symbol(f"hpcml_{letter}gemm", address)
    return found


_stand_ins: list[Any] = []  # compiled code must outlive its address
