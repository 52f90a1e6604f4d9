"""ZeRO in every stage and form against one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh
from tests.parallel.cases import KINDS, OPTIMIZERS, reference, run

cases = pytest.mark.parametrize
WAYS: dict[str, dict[str, Any]] = {
    "1": {"zero": 1},
    "2": {"zero": 2},
    "3": {"zero": 3},
    "1 small buckets": {"zero": 1, "bucket_mb": 1e-4},
    "2 small buckets": {"zero": 2, "bucket_mb": 1e-4},
    "3 small buckets": {"zero": 3, "bucket_mb": 1e-4},
    "0 overlap": {"zero": 0, "overlap": True},
    "1 overlap": {"zero": 1, "overlap": True},
    "2 overlap": {"zero": 2, "overlap": True},
    "3 overlap": {"zero": 3, "overlap": True},
    "1 layers": {"zero": 1, "zero_split": "layers"},
    "2 layers": {"zero": 2, "zero_split": "layers"},
    "3 layers": {"zero": 3, "zero_split": "layers"},
    "3 layers overlap": {"zero": 3, "zero_split": "layers", "overlap": True},
}


@cases("microbatch", [0, 1, 3])
@cases("size", [1, 8])
@cases("optimizer", OPTIMIZERS)
@cases("kind", KINDS)
@cases("way", WAYS)
def test_parameters_in_float64(
    mesh: Mesh, way: str, kind: str, optimizer: str, size: int, microbatch: int
) -> None:
    expected = reference(kind, "float64", optimizer, size, 5)
    found = run(kind, mesh, "float64", optimizer, size, microbatch, 5, **WAYS[way])
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-11)
    for after, parameters in expected.parameters.items():
        for name, array in parameters.items():
            np.testing.assert_allclose(
                found.parameters[after][name], array, rtol=0, atol=1e-12,
                err_msg=f"{name} after {after} steps",
            )  # fmt: skip
