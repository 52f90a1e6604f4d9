"""Further checks of every algorithm: linearity and adjoints, bits. See `conformance`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hpcml.backend import to_kind
from hpcml.comm import Axis
from tests.comm.algorithms.conformance import UFUNCS, Case, assert_same, call, sequential, serves

ROUNDED = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
"""Types whose sums depend on the order."""

ADJOINTS = {
    "allreduce": "allreduce",
    "reduce_scatter": "allgather",
    "allgather": "reduce_scatter",
    "broadcast": "reduce",
    "reduce": "broadcast",
    "scatter": "gather",
    "gather": "scatter",
    "alltoall": "alltoall",
}


def check_adjoint(axis: Axis, name: str, case: Case) -> None:
    """<F x, y> = <x, F* y> in float64, for the sum: F* is the operation of the table above.

    Arrays that a rank does not have (off the root) are zeros: they add nothing to the products.
    """
    case = Case(case.operation, case.counts, np.dtype(np.float64), root=case.root, seed=case.seed)
    if not serves(axis, name, case):
        return
    back = Case(ADJOINTS[case.operation], case.counts, case.dtype, root=case.root)
    x, y = (_vector(axis, which, case.seed) for which in (case, back))
    forward = call(axis, name, case, x)
    backward = call(axis, None, back, y)
    forward, backward = (_root_only(axis, *pair) for pair in ((case, forward), (back, backward)))
    mine = np.array([np.vdot(*_same(forward, y)), np.vdot(*_same(x, backward))])
    left, right = axis.allreduce(mine)
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-11)


def _vector(axis: Axis, case: Case, seed: int) -> np.ndarray:
    """What this rank has of a random input; zeros where only the root's counts."""
    count = sum(case.counts)
    if case.operation in ("allgather", "gather"):
        count = case.counts[axis.rank]
    random = np.random.default_rng([seed, axis.rank, len(case.operation)])
    off = case.operation in ("broadcast", "scatter") and axis.rank != case.root
    return np.zeros(count) if off else random.standard_normal(count)


def _root_only(axis: Axis, case: Case, found: np.ndarray | None) -> np.ndarray:
    """What the operation gave this rank, zero where it gave nothing."""
    if found is None:
        return np.zeros(sum(case.counts))
    return found


def _same(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of one space."""
    assert x.shape == y.shape
    return x, y


def check_order(axis: Axis, name: str, case: Case, module: Any = np) -> None:
    """An ordered algorithm gives the bits of the fold in the order of the ranks.

    16-bit floats are added in float32 and rounded once; in deterministic mode at every addition.
    Where it accumulates, what the result held comes first. Arrays are those of `module`.
    """
    rows = [_rounded(rank, sum(case.counts), case.dtype) for rank in range(axis.size)]
    start = sum(case.counts[: axis.rank])
    own = slice(start, start + case.counts[axis.rank])
    cut = own if case.operation == "reduce_scatter" else slice(None)
    out = _rounded(99, sum(case.counts), case.dtype)[cut].copy()
    parts = [row[cut] for row in rows]
    expected = sequential([out, *parts] if case.accumulates else parts, "sum", axis.deterministic)
    result = call(axis, name, case, module.asarray(rows[axis.rank]), module.asarray(out))
    if case.operation != "reduce" or axis.rank == case.root:
        assert_same(to_kind(result, "cpu"), expected)


def check_same_bits(axis: Axis, name: str, count: int) -> None:
    """All ranks have the same bits of an all-reduce, and none has lost a NaN."""
    inputs = [_special(rank, count) for rank in range(axis.size)]
    nan = np.isnan(inputs).any(axis=0)
    for op in UFUNCS:
        case = Case("allreduce", (count, *[0] * (axis.size - 1)), np.dtype(np.float32), op)
        if not serves(axis, name, case):
            return
        result = call(axis, name, case, inputs[axis.rank])
        assert np.isnan(result[nan]).all()
        bits = result.view(np.uint32)
        lowest, highest = axis.allreduce(bits, "min"), axis.allreduce(bits, "max")
        assert_same(lowest, highest)


def _special(seed: int, count: int) -> np.ndarray:
    """Floats with zeros of either sign, infinities and NaN among them."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(count).astype(np.float32)
    special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e38], np.float32)
    x[::3] = random.choice(special, x[::3].size)
    return x


def _rounded(seed: int, count: int, dtype: Any) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(count) * 3
    return np.asarray(values, dtype)
