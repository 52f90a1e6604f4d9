"""The matrix products of a linear layer."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.kernels import cpu, generic, of
from tests.kernels.support import DTYPES, close, randoms

SIZES = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (7, 5, 3), (64, 33, 65), (300, 128, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), SIZES)
@pytest.mark.parametrize("name", ["linear", "linear_input_gradient", "linear_weight_gradient"])
def test_products(rows: int, n_in: int, n_out: int, name: str, dtype: str) -> None:
    x, weight, g = randoms(dtype, (rows, n_in), (n_out, n_in), (rows, n_out))
    of(x)
    left, right, like = {
        "linear": (x, weight, g),
        "linear_input_gradient": (g, weight, x),
        "linear_weight_gradient": (g, x, weight),
    }[name]
    out, expected = np.full_like(like, np.nan), np.full(like.shape, np.nan)
    getattr(cpu, name)(left, right, out)
    getattr(generic, name)(left.astype(np.float64), right.astype(np.float64), expected)
    close(out, expected, dtype, 8)
