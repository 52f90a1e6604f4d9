"""What tests of kernels on the stand-in share: numbers of each type, and what is close enough."""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
import pytest

from hpcml import backend

DTYPES = ("float32", "float64", "bfloat16", "float16")
TOLERANCE = {"float32": 2e-6, "float64": 1e-12, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Of the largest element, times what a test allows: one rounding of 16 bits, some of the others."""

KEY, FIRST = np.uint64(0xFEDCBA9876543210), np.uint64((1 << 33) + 5)
"""Of random numbers: a key, and a sample with bits beyond the lowest 32."""


def of_types(*names: str) -> pytest.MarkDecorator:
    """Numbers of these types only, to spare compiling kernels for the others; on a GPU of all."""
    chosen = DTYPES if os.environ.get("HPCML_GPU") == "1" else names
    return pytest.mark.parametrize("numbers", chosen, indirect=True)


few = of_types("float32", "bfloat16")
"""For what all types have in common."""


class Numbers:
    """Random arrays on the device, and the same numbers on the host in float64."""

    def __init__(self, device: Any, dtype: str) -> None:
        self.device, self.dtype = device, backend.dtype(dtype)
        self.sums = np.dtype(np.float64 if dtype == "float64" else np.float32)

    def normal(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, sums: bool = False
    ) -> Any:
        """A pair of standard normal numbers, of the type of sums if that is asked for."""
        seed = zlib.crc32(repr((shape, scale, shift, self.dtype.name)).encode())
        values = np.random.default_rng(seed).standard_normal(shape) * scale + shift
        return self.pair(values, sums)

    def pair(self, values: Any, sums: bool = False) -> Any:
        """Numbers on the device, and what they are there in float64."""
        rounded = np.asarray(values).astype(self.sums if sums else self.dtype)
        return self.device.asarray(rounded), rounded.astype(np.float64)

    def empty(self, *shape: int, sums: bool = False) -> Any:
        """An array for results, and one for those to compare with."""
        return self.device.empty(shape, self.sums if sums else self.dtype), np.empty(shape)

    def close(self, actual: Any, expected: Any, factor: float = 1.0, scale: float = 1e-30) -> None:
        """Assert that results are those expected; `scale`: what else the tolerance is of."""
        found = host(actual).astype(np.float64)
        assert found.shape == expected.shape
        limit = factor * TOLERANCE[actual.dtype.name] * np.abs(expected).max(initial=scale)
        np.testing.assert_allclose(found, expected, 0, limit)


def host(array: Any) -> Any:
    """The values of an array of the stand-in or of CuPy."""
    return array.memory if hasattr(array, "memory") else array.get()


def skewed(device: Any, array: Any) -> Any:
    """A copy that does not start where 16 bytes do."""
    room = device.empty(array.size + 1, array.dtype)
    moved = room[1:].reshape(array.shape)
    moved[...] = array
    return moved
