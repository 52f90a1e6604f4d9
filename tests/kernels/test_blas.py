"""GEMM inside compiled code: a BLAS is found; without one NumPy's product stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from hpcml.kernels.cpu import blas

ROOT = Path(__file__).resolve().parents[2]

# Attention through the stand-in, compared with the specification. `_find` is replaced before
# anything is compiled or loaded, as if this NumPy had no BLAS of a known name.
WITHOUT_BLAS = """
from hpcml.kernels.cpu import blas
blas._find = lambda letter: None
assert set(blas.register().values()) == {"numpy"}
from tests.kernels import test_attention as t
for dtype in ("float32", "float64"):
    t.of(t.np.empty(0, dtype))
    for case in t.CASES:
        for causal in (False, True):
            t.test_attention(case, causal, t.NEVER, dtype)
    t.test_packed_projections_need_no_copies(True, dtype)
"""


def numpy_has_a_blas() -> bool:
    return any(library["user_api"] == "blas" for library in threadpoolctl.threadpool_info())


def test_the_blas_of_numpy_is_found() -> None:
    if not numpy_has_a_blas():
        pytest.skip("this NumPy was built without a BLAS library")
    assert "numpy" not in [blas.register()[letter] for letter in "sd"]


def test_attention_is_right_without_a_blas() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_BLAS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_the_stand_in_is_a_gemm(real: str, turned_a: bool, turned_b: bool, beta: int) -> None:
    m, n, k, slack = 3, 5, 4, 2  # leading dimensions larger than the rows
    generator = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return generator.standard_normal((rows, columns + slack)).astype(real)

    a = matrix(k, m) if turned_a else matrix(m, k)
    b = matrix(n, k) if turned_b else matrix(k, n)
    c = matrix(m, n)
    before = c.copy()
    if beta == 0:
        c[:, :n] = np.nan  # must not be read
    routine = blas._Routine("s" if real == "float32" else "d").pointer
    kinds = [blas.TRANSPOSED if turned else blas.PLAIN for turned in (turned_a, turned_b)]
    pointers = [array.ctypes.data for array in (a, b, c)]
    routine(
        int(blas.ROW_MAJOR), *map(int, kinds), m, n, k, 0.5, pointers[0], a.shape[1],
        pointers[1], b.shape[1], float(beta), pointers[2], c.shape[1],
    )  # fmt: skip
    left, right = a[:, :-slack], b[:, :-slack]
    product = (left.T if turned_a else left) @ (right.T if turned_b else right)
    expected = 0.5 * product + beta * before[:, :n]
    np.testing.assert_allclose(c[:, :n], expected, 1e-5, 1e-5)
    np.testing.assert_array_equal(c[:, n:], before[:, n:])
