"""The fused loops, one module for each kind of device, all with the same names and signatures.

`of(array)` picks the module: `cpu` (compiled by numba) for NumPy arrays of float32 and float64,
`generic` (array expressions, the readable specification of each kernel) for everything else.
16-bit floats are computed with in float32; `widen` and `narrow` lead there and back. But see
`multiplies`.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from hpcml.backend import Array, xp

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@functools.cache
def compiled(dtype: str) -> ModuleType:
    """Return the module of compiled kernels once those for "float32" or "float64" are loaded."""
    from hpcml.kernels import cpu

    cpu.load(dtype)
    return cpu


@functools.cache
def _generic() -> ModuleType:
    from hpcml.kernels import generic

    return generic


def of(array: Array) -> ModuleType:
    """Return the module of kernels for `array`'s device and dtype."""
    if type(array) is np.ndarray:
        if array.dtype is _FLOAT32:  # NumPy has one object for each
            return compiled("float32")
        if array.dtype == _FLOAT32 or array.dtype == _FLOAT64:
            return compiled(array.dtype.name)
    return _generic()


@functools.cache
def multiplies(dtype: np.dtype[Any]) -> bool:
    """Whether there are products of matrices of this 16-bit type, on this machine's CPU.

    That is bfloat16, where MKL is installed and the CPU has instructions for it.
    """
    if dtype.name != "bfloat16":
        return False
    return bool(compiled("float32").blas.register()["b"] != "numpy")


def widen(x: Array, out: Array | None = None) -> Array:
    """Return 16-bit floats `x` in float32, exactly; in `out`, C-contiguous, if that is given."""
    out = xp(x).empty(x.shape, _FLOAT32) if out is None else out
    if isinstance(x, np.ndarray):
        words = np.ascontiguousarray(x).view(np.uint16).reshape(-1)
        compiled("float32").halves.widen(words, out.reshape(-1), x.dtype != np.float16)
    else:
        out[...] = x
    return out


def narrow(x: Array, out: Array) -> Array:
    """Round float32 `x` into the 16-bit floats `out`, to nearest, of two the even one; return it.

    x and out have one shape; what is too large becomes infinite, without a warning.
    """
    if isinstance(x, np.ndarray) and x.dtype == _FLOAT32 and out.flags.c_contiguous:
        words = out.view(np.uint16).reshape(-1)
        numbers = np.require(x, requirements=("C", "W")).reshape(-1)
        compiled("float32").halves.narrow(numbers, words, out.dtype != np.float16)
    else:
        with np.errstate(over="ignore"):
            out[...] = x
    return out
