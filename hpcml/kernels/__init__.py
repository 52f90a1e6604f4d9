"""The fused loops, one module for each kind of device, all with the same names and signatures.

`of(array)` picks the module: `cpu` (compiled by numba) for NumPy arrays of float32 and float64,
`cuda` for arrays of a GPU, `generic` (array expressions, the readable specification of each kernel)
for everything else. 16-bit floats are computed with in float32; `widen` and `narrow` lead there and
back. But see `multiplies`, and GPUs, whose kernels take them as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.backend import Array, xp


class _Local(threading.local):
    repeatable = False


_local = _Local()


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Within, if it is wanted, kernels of this thread give the same bits each time.

    Those of this package do so anyway; those of others may sum in an order of the moment.
    """
    before, _local.repeatable = _local.repeatable, wanted
    try:
        yield
    finally:
        _local.repeatable = before


def is_repeatable() -> bool:
    """Whether this thread is within `repeatable`."""
    return _local.repeatable


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
    return _generic() if isinstance(array, np.ndarray) else _cuda()


@functools.cache
def _cuda() -> ModuleType:
    from hpcml.kernels import cuda

    return cuda


@functools.cache
def _compiled_images(dtype: str) -> ModuleType:
    compiled(dtype)
    from hpcml.kernels.cpu import images

    images.load(dtype)
    return images


def images(array: Array) -> ModuleType:
    """Return the module of kernels for images, for `array`'s device and dtype; see `of`.

    They are loaded when first asked for: who computes with none does not wait for them.
    """
    if isinstance(array, np.ndarray):
        if type(array) is np.ndarray and array.dtype.name in ("float32", "float64"):
            return _compiled_images(array.dtype.name)
        from hpcml.kernels import generic_images

        return generic_images
    from hpcml.kernels.cuda import images

    return images


@functools.cache
def _compiled_winograd(dtype: str) -> ModuleType:
    _compiled_images(dtype)
    from hpcml.kernels.cpu.images import winograd

    winograd.load(dtype)
    return winograd


def convolutions(array: Array, winograd: bool = False) -> ModuleType:
    """Return the module of the three passes of convolutions; see `images`.

    winograd: that which multiplies less, and rounds more, where it gains (`cpu.images.winograd`).
    """
    if winograd and type(array) is np.ndarray and array.dtype.name in ("float32", "float64"):
        return _compiled_winograd(array.dtype.name)
    return images(array)


@functools.cache
def multiplies(dtype: np.dtype[Any]) -> bool:
    """Whether there are products of matrices of this 16-bit type, on this machine's CPU.

    That is bfloat16, where MKL is installed and the CPU has instructions for it.
    """
    if dtype.name != "bfloat16":
        return False
    return bool(compiled("float32").blas.register()["b"] != "numpy")


def widen(x: Array, out: Array | None = None) -> Array:
    """Return 16-bit floats `x` in float32, exactly; in `out`, dense in any order, if given."""
    out = xp(x).empty_like(x, _FLOAT32) if out is None else out
    if isinstance(x, np.ndarray):
        order = backend.order(out)
        words = np.ascontiguousarray(x.transpose(order)).view(np.uint16).reshape(-1)
        numbers = out.transpose(order).reshape(-1)
        compiled("float32").halves.widen(words, numbers, x.dtype != np.float16)
    else:
        out[...] = x
    return out


def narrow(x: Array, out: Array) -> Array:
    """Round float32 `x` into the 16-bit floats `out`, to nearest, of two the even one; return it.

    x and out have one shape; what is too large becomes infinite, without a warning.
    """
    ours = isinstance(x, np.ndarray) and x.dtype == _FLOAT32
    if ours and (words := backend.in_order(out)).flags.c_contiguous:
        numbers = np.require(x.transpose(backend.order(out)), requirements=("C", "W")).reshape(-1)
        words = words.view(np.uint16).reshape(-1)
        compiled("float32").halves.narrow(numbers, words, out.dtype != np.float16)
    else:
        with np.errstate(over="ignore"):
            out[...] = x
    return out
