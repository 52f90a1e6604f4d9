"""The matrix products of a linear layer, in float32, float64 and bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml.kernels import cpu, generic, of
from tests.kernels.support import DTYPES, close, randoms

SIZES = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (7, 5, 3), (64, 33, 65), (300, 128, 17)]
NAMES = ["linear", "linear without bias", "linear_input_gradient", "linear_weight_gradient"]


def operands(name: str, rows: int, n_in: int, n_out: int, dtype: str) -> tuple[list[Any], Any]:
    """The arguments of a kernel, and an array like its result."""
    shapes = (rows, n_in), (n_out, n_in), (rows, n_out), (n_out,)
    x, weight, g, bias = randoms(dtype, *shapes)
    return {
        "linear": ([x, weight, bias], g),
        "linear without bias": ([x, weight, bias[:0]], g),
        "linear_input_gradient": ([g, weight], x),
        "linear_weight_gradient": ([g, x], weight),
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_products(rows: int, n_in: int, n_out: int, name: str, dtype: str) -> None:
    args, like = operands(name, rows, n_in, n_out, dtype)
    of(like)
    out, expected = np.full_like(like, np.nan), np.full(like.shape, np.nan)
    getattr(cpu, name.split()[0])(*args, out)
    getattr(generic, name.split()[0])(*[a.astype(np.float64) for a in args], expected)
    close(out, expected, dtype, 8)


@pytest.mark.parametrize(("rows", "n_in", "n_out"), [*SIZES, (2100, 9, 3), (5, 3, 1100)])
@pytest.mark.parametrize("name", NAMES)
def test_products_of_bfloat16_are_rounded_once(rows: int, n_in: int, n_out: int, name: str) -> None:
    """By the library that multiplies them, or NumPy in its stead."""
    args, like = operands(name, rows, n_in, n_out, "float32")
    short = [a.astype(ml_dtypes.bfloat16) for a in args]
    words = [a.view(np.uint16) for a in short]
    out, expected = np.full(like.shape, 0x7FC0, np.uint16), np.full(like.shape, np.nan)
    getattr(of(like).brain, name.split()[0])(*words, out)
    getattr(generic, name.split()[0])(*[a.astype(np.float64) for a in short], expected)
    found = out.view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(found, expected, 2**-8, 1e-6 * np.abs(expected).max(initial=1e-30))
