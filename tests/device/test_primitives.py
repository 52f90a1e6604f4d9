"""Every primitive with arrays of a device: values and gradients are those of the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from hpcml import backend
from hpcml.autograd import Primitive, Tensor
from tests.autograd.cases import TABLE
from tests.autograd.support import normal
from tests.device import emulator
from tests.device.support import DTYPES, TOLERANCE

ALL = DTYPES if os.environ.get("HPCML_GPU") == "1" else ("float64", "bfloat16")
"""The others have the same kernels and the same expressions."""


@pytest.fixture(autouse=True)
def upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each kernel once: that the order of its threads is none is shown by its own tests."""
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that cases hand over as they are lie where the inputs do, as they must."""
    call = Primitive.__call__

    def moved(value: Any, kind: str) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(each, kind) for each in value)
        return backend.to_kind(value, kind) if isinstance(value, np.ndarray) else value

    def made(self: Primitive, *inputs: Any, **attributes: Any) -> Any:
        kind = next(backend.kind(x.data) for x in inputs if isinstance(x, Tensor))
        return call(self, *inputs, **{k: moved(v, kind) for k, v in attributes.items()})

    monkeypatch.setattr(Primitive, "__call__", made)


def computed(function: Any, arrays: list[Any], dtype: Any, kind: str) -> list[Any]:
    """The value and the gradients of a case, on the host."""
    inputs = [Tensor(backend.to_kind(x.astype(dtype), kind), True) for x in arrays]
    out = function(*inputs)
    out.backward(backend.to_kind(normal(*out.shape, salt=7).astype(out.dtype), kind))
    found = [out.data, *[x.gradient for x in inputs]]
    assert {backend.kind(x) for x in found} == {kind}
    return [backend.to_kind(x, "cpu").astype(np.float64) for x in found]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_a_primitive(operation: Primitive, dtype: str, device: Any) -> None:
    for function, arrays in TABLE[operation]:
        both = [computed(function, arrays, backend.dtype(dtype), kind) for kind in ("cuda", "cpu")]
        for found, expected in zip(*both, strict=True):
            limit = 20 * TOLERANCE[dtype] * np.abs(expected).max(initial=1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
