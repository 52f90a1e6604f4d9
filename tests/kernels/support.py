"""What the tests of the kernels share: arrays of random numbers and the tolerance of each dtype."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 7, 63, 64, 65, 300]  # about the widths of vectors and tiles
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}  # of the largest element, times what a test allows


def randoms(dtype: str, *shapes: tuple[int, ...]) -> list[Array]:
    """Return an array of standard normal numbers for each shape, the same on every run."""
    generator = np.random.default_rng(zlib.crc32(repr((dtype, shapes)).encode()))
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def close(
    actual: Any, expected: Any, dtype: str, factor: float = 1.0, scale: float = 1e-30
) -> None:
    """Assert that two arrays agree to the tolerance of `dtype` relative to the largest element.

    `scale` is what else the tolerance may be relative to: where a small result is a difference.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    limit = factor * TOLERANCE[dtype] * np.abs(expected).max(initial=scale)
    np.testing.assert_allclose(actual, expected, 0, limit)


def bits(*arrays: Array) -> list[bytes]:
    """Return the bytes of each array, for comparisons that allow no rounding at all."""
    return [array.tobytes() for array in arrays]
