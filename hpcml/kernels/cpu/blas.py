"""GEMM inside compiled code: the routine of a BLAS library, called by address.

It is the BLAS that NumPy has loaded; on Intel's CPUs MKL, where the extra `mkl` has installed it
(OpenBLAS is the faster one elsewhere). The address is registered under a name of our own, so that
compiled code on disk stays valid whatever the next process finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from llvmlite import binding as llvm
from numba import types
from numba.extending import overload

from hpcml import backend
from hpcml.kernels.cpu.jit import inline

ROW_MAJOR, PLAIN, TRANSPOSED = np.int32(101), np.int32(111), np.int32(112)  # from cblas.h

# NumPy's wheels, conda's and Debian's ILP64 builds, then LP64. An LP64 routine reads the lower half
# of each 64-bit argument, which the calling conventions of Linux on x86-64 and AArch64 allow.
_PLAIN = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_", "cblas_{}gemm_64", "cblas_{}gemm")
_NAMES = {letter: tuple(name.format(letter) for name in _PLAIN) for letter in "sd"}
_NAMES["b"] = ("cblas_gemm_bf16bf16f32_64",)  # MKL's: bfloat16 factors, sums in float32


def _signature(real: Any) -> Any:
    order, size, address = types.int32, types.int64, types.intp
    return types.void(
        order, order, order, size, size, size,
        real, address, size, address, size, real, address, size,
    )  # fmt: skip


_sgemm = types.ExternalFunction("hpcml_sgemm", _signature(types.float32))
_dgemm = types.ExternalFunction("hpcml_dgemm", _signature(types.float64))
_bgemm = types.ExternalFunction("hpcml_bgemm", _signature(types.float32))


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


@inline
def gemm_brain(ta: Any, tb: Any, m: Any, n: Any, k: Any, a: Any, lda: Any, b: Any, ldb: Any,
               c: Any, ldc: Any) -> None:  # fmt: skip
    """C = op(A) op(B), A and B of bfloat16, C of float32."""
    one, zero = np.float32(1), np.float32(0)
    _bgemm(ROW_MAJOR, ta, tb, m, n, k, one, a, lda, b, ldb, zero, c, ldc)


class _Routine:
    """What stands in for a BLAS that cannot be found: NumPy's product, called back."""

    def __init__(self, letter: str) -> None:
        self.dtype = np.dtype(np.float64 if letter == "d" else np.float32)
        self.factor = backend.dtype("bf16") if letter == "b" else self.dtype
        number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        real = ctypes.c_double if letter == "d" else ctypes.c_float
        kind = ctypes.CFUNCTYPE(
            None, number, number, number, size, size, size,
            real, address, size, address, size, real, address, size,
        )  # fmt: skip
        self.pointer = kind(self._gemm)
        self.address = ctypes.cast(self.pointer, address).value or 0

    def _gemm(self, order: int, ta: int, tb: int, m: int, n: int, k: int, alpha: float, a: int,
              lda: int, b: int, ldb: int, beta: float, c: int, ldc: int) -> None:  # fmt: skip
        kind = self.factor
        left = self._at(a, k, m, lda, kind).T if ta == TRANSPOSED else self._at(a, m, k, lda, kind)
        right = self._at(b, n, k, ldb, kind).T if tb == TRANSPOSED else self._at(b, k, n, ldb, kind)
        left, right = left.astype(self.dtype, copy=False), right.astype(self.dtype, copy=False)
        out = self._at(c, m, n, ldc, self.dtype)
        product = alpha * (left @ right)
        out[...] = product if beta == 0 else product + beta * out

    def _at(
        self, address: int, rows: int, columns: int, leading: int, dtype: np.dtype[Any]
    ) -> np.ndarray[Any, Any]:
        """The matrix at an address, whose rows lie `leading` elements apart."""
        size = dtype.itemsize
        count = (rows - 1) * leading + columns if rows and columns else 0
        memory = np.ctypeslib.as_array((ctypes.c_ubyte * (count * size)).from_address(address or 0))
        return np.ndarray((rows, columns), dtype, memory, 0, (leading * size, size))


def _libraries() -> Iterator[ctypes.CDLL]:
    """Libraries to look into: on Intel's CPUs MKL where installed, then what NumPy has loaded."""
    if _is_intel():
        with contextlib.suppress(PackageNotFoundError, OSError):
            for file in files("mkl") or ():
                if file.name.startswith("libmkl_rt."):
                    # The same bits wherever an array starts: MKL's default depends on alignment.
                    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
                    # `team` divides products: no library of threads is asked for, nor needed.
                    os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
                    yield ctypes.CDLL(str(file.locate()))
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            yield ctypes.CDLL(library["filepath"])


def _is_intel() -> bool:
    return "GenuineIntel" in _cpu()


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it: without, a BLAS is slower than in float32."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_cpu().split())


@functools.cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def _find(letter: str) -> tuple[int, str] | None:
    """Address of a library's GEMM and the name of its file."""
    if letter == "b" and not _multiplies_bfloat16():
        return None
    for library in _libraries():
        for name in _NAMES[letter]:
            with contextlib.suppress(AttributeError):
                function = getattr(library, name)
                address = ctypes.cast(function, ctypes.c_void_p).value
                assert address is not None
                return address, Path(library._name).name
    return None


@functools.cache
def register() -> dict[str, str]:
    """Make the GEMM symbols known to compiled code; say which library serves each letter.

    s, d: float32 and float64; b: factors of bfloat16, sums in float32. "numpy" is NumPy's product,
    called back where no library was found.
    """
    serving = {}
    for letter in _NAMES:
        found = _find(letter)
        if found is None:
            _stand_ins.append(_Routine(letter))
            found = _stand_ins[-1].address, "numpy"
        llvm.add_symbol(f"hpcml_{letter}gemm", found[0])
        serving[letter] = found[1]
    threadpoolctl.threadpool_limits(limits=1, user_api="blas")  # `team` divides the products
    return serving


_stand_ins: list[_Routine] = []  # a routine must outlive its address
