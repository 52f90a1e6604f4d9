"""Spatial parallelism with 16 bits, accumulation, deterministic mode and padding of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from tests.parallel.cases import serial_mesh, values
from tests.parallel.spatial.models import MODELS, make

cases = pytest.mark.parametrize


@cases(("dtype", "tolerance"), [("bfloat16", 3e-2), ("float16", 3e-3)])
@cases("kind", ["divided", "pixels"])
def test_losses_in_16_bits(kind: str, dtype: str, tolerance: float) -> None:
    batch = MODELS[kind][2]

    def program(mesh: Mesh, **options: Any) -> list[float]:
        step = make(kind, mesh, hpcml.backend.dtype(dtype), **options)
        return [step(batch(number)) for number in range(3)]

    expected = program(serial_mesh())
    for found in on_threads(lambda: program(Mesh(sp_h=2), zero=1), ranks=2):
        np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_accumulated_gradients() -> None:
    """Batches one after the other without an update make the update of all of them."""
    batch = MODELS["classifier"][2]

    def program(mesh: Mesh) -> dict[str, np.ndarray]:
        step = make("classifier", mesh, grad_clip=0.0, zero=1)
        with step.no_sync():
            step(batch(0, 3))
        step(batch(1, 3))
        return values(step)

    expected = program(serial_mesh())
    for found in on_threads(lambda: program(Mesh(sp_w=2)), ranks=2):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-11, err_msg=name)


def test_bits_do_not_depend_on_data_parallel_ranks() -> None:
    """At equal microbatches and the same spatial ranks."""
    batch = MODELS["pixels"][2]

    def program(**layout: int) -> dict[str, np.ndarray]:
        mesh = Mesh(deterministic=True, **layout)
        step = make("pixels", mesh, "float32", microbatch=1, zero=layout.get("dp", 1) - 1)
        for number in range(2):
            step(batch(number, 4))
        return values(step)

    expected = on_threads(lambda: program(sp_w=2), ranks=2)[0]
    for found in on_threads(lambda: program(dp=2, sp_w=2), ranks=4):
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name
