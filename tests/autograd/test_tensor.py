"""What tensors are made of, and what their type becomes when they meet something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Tensor
from tests.autograd.support import normal

MIXED: list[Callable[[Any], Any]] = [
    lambda x: x + np.float64(2), lambda x: np.float64(2) * x, lambda x: x / np.int64(2),
    lambda x: x * np.array(2.5), lambda x: x + np.arange(3), lambda x: np.arange(3) - x,
    lambda x: x * Tensor(np.arange(3)), lambda x: x * (x > 0), lambda x: x ** Tensor([1, 2, 3]),
    lambda x: x * [1, 2, 3], lambda x: np.ones(3, np.float32) + x, lambda x: x.clamp(np.float64(0)),
    lambda x: x.mean() * x, lambda x: x + x.sum().item(), lambda x: x.masked_fill(x < 0, np.pi),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_numbers_and_integers_leave_float32(number: int) -> None:
    x = Tensor(normal(2, 3, dtype="float32"), requires_grad=True)
    out = MIXED[number](x)
    assert isinstance(out, Tensor) and out.dtype == np.float32
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == np.float32 and x.grad.shape == (2, 3)


def test_what_a_tensor_is_made_of() -> None:
    array = normal(2, 3)
    assert Tensor(array).data is array
    assert Tensor(Tensor(array)).data is array
    assert Tensor(1.5).dtype == np.float32 and Tensor([1.0, 2]).dtype == np.float32
    assert Tensor([1, 2]).dtype == np.int64 and Tensor(True).dtype == bool
    assert Tensor(np.float64(2)).dtype == np.float64
    tensor = Tensor(array)
    assert (tensor.ndim, tensor.size(), tensor.size(1), tensor.numel()) == (2, (2, 3), 3, 6)
    assert len(tensor) == 2 and Tensor(2.0).item() == 2 == float(Tensor(2.0)) == int(Tensor(2.0))
    assert tensor.tolist() == array.tolist()
    assert bool(Tensor(1)) and not bool(Tensor(0.0))
    with pytest.raises(TypeError, match="no dimensions"):
        len(Tensor(1.0))
    with pytest.raises(TypeError, match="int64: only floats"):
        Tensor([1, 2], requires_grad=True)
