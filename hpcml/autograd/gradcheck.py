"""Check of adjoints by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcml.autograd.record import no_grad
from hpcml.autograd.tensor import Tensor


def gradcheck(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    eps: float = 1e-6,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    directions: int = 4,
) -> bool:
    """Compare <g, J d> by central differences with <J* g, d> for random g, d, in float64.

    function: takes `inputs`, returns one tensor. Each input that requires a gradient is moved along
    `directions` random directions. Returns True, or raises an AssertionError that names the input
    and both values.
    """
    for number, tensor in enumerate(inputs):
        if tensor.requires_grad and tensor.dtype != np.float64:
            raise TypeError(f"gradcheck: input {number} is {tensor.dtype}, use float64")
    random = np.random.default_rng(0)
    for tensor in inputs:
        tensor.grad = None
    out = function(*inputs)
    g = random.standard_normal(out.shape)
    out.backward(g)

    def value() -> float:
        with no_grad():
            return float((function(*inputs).numpy() * g).sum())

    for number, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            continue
        gradient = np.zeros(tensor.shape) if tensor.gradient is None else tensor.gradient
        start = tensor.data
        for _ in range(directions):
            d = np.asarray(random.standard_normal(tensor.shape))
            tensor.data = np.asarray(start + eps * d)
            above = value()
            tensor.data = np.asarray(start - eps * d)
            below = value()
            tensor.data = start
            expected, found = (above - below) / (2 * eps), float((gradient * d).sum())
            scale = float(np.abs(gradient * d).sum())
            if abs(expected - found) > atol + rtol * max(abs(expected), scale):
                raise AssertionError(
                    f"gradcheck: input {number} of shape {tensor.shape}: the adjoint says {found}, "
                    f"finite differences say {expected}"
                )
    return True
