"""The fused loops, one module for each kind of device, all with the same names and signatures.

`of(array)` picks the module: `cpu` (compiled by numba) for NumPy arrays of float32 and float64,
`generic` (array expressions, the readable specification of each kernel) for everything else.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from hpcml.backend import Array

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
    """Return the kernel module for `array`'s device and dtype."""
    if type(array) is np.ndarray:
        if array.dtype == _FLOAT32:
            return compiled("float32")
        if array.dtype == _FLOAT64:
            return compiled("float64")
    return _generic()
