"""Combining the rows of a matrix that holds the same piece of several ranks' memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.backend import is_half
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array


def adds_floats(reduction: Reduction, dtype: np.dtype[Any]) -> bool:
    """Whether a compiled sum of floats is what is asked for."""
    return reduction.op == "sum" and dtype.char in "fd"  # a name takes NumPy a microsecond


def adds_halves(reduction: Reduction, dtype: np.dtype[Any]) -> bool:
    """Whether a compiled sum of 16-bit floats is what is asked for."""
    return reduction.op == "sum" and is_half(dtype)


def fold_of(reduction: Reduction, dtype: np.dtype[Any]) -> Callable[..., None]:
    """The function (rows, results, own, first, last, shift) that combines columns of all rows.

    Column c of the result goes to column c - shift of all rows of `results`; `Reduction.onto` adds
    to what row `own` of it holds.
    """

    def fold(rows: Array, results: Array, own: int, first: int, last: int, shift: int) -> None:
        bounds = (own, first, last, shift, reduction.onto)
        alone = rows.shape[0] == 1  # of its node
        if adds_floats(reduction, dtype) and not alone:
            kernels.compiled(dtype.name).shared.sum_rows(rows, results, *bounds)
        elif adds_halves(reduction, dtype) and not alone:
            add = kernels.compiled("float32").shared.sum_half_rows
            add(rows, results, *bounds, dtype.name == "bfloat16", reduction.stepwise)
        elif last > first:
            target = slice(first - shift, last - shift)
            combined = results[own, target].view(dtype).copy()
            reduction.fold([row[first:last].view(dtype) for row in rows], combined)
            results[:, target] = combined.view(rows.dtype)

    return fold
