"""Check of adjoints by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcml.autograd.halves import HALVES
from hpcml.autograd.mode import no_grad
from hpcml.autograd.tensor import Tensor
from hpcml.backend import Array

_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
_ROUNDINGS = 4
"""What a gradient in 16 bits may be off by, in roundings of each element."""


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
    `directions` random directions. Adjoints of 16-bit inputs are computed in 16 bits, and compared,
    to within roundings, with differences in float64: those of rounded values would tell nothing.
    Returns True, or raises an AssertionError that names the input and both values.
    """
    for number, tensor in enumerate(inputs):
        if tensor.requires_grad and tensor.dtype not in {np.dtype(np.float64), *HALVES}:
            raise TypeError(f"gradcheck: input {number} is {tensor.dtype}, use float64")
    random = np.random.default_rng(0)
    for tensor in inputs:
        tensor.grad = None
    out = function(*inputs)
    g = random.standard_normal(out.shape).astype(out.dtype)
    out.backward(g)
    g = g.astype(np.float64)
    given = [tensor.data for tensor in inputs]
    for tensor in inputs:
        if tensor.dtype in HALVES:
            rtol = max(rtol, _ROUNDINGS * _EPSILON[tensor.dtype.name])
            tensor.data = tensor.data.astype(np.float64)
    try:
        _compare(function, inputs, g, eps, rtol, atol, directions, random)
    finally:
        for tensor, array in zip(inputs, given, strict=True):
            tensor.data = array
    return True


def _compare(
    function: Callable[..., Tensor], inputs: list[Tensor], g: Array,
    eps: float, rtol: float, atol: float, directions: int, random: np.random.Generator,
) -> None:  # fmt: skip
    """Compare the gradients of `inputs` with differences of <function, g>."""

    def value() -> float:
        with no_grad():
            return float((function(*inputs).numpy() * g).sum())

    for number, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            continue
        gradient = np.zeros(tensor.shape) if tensor.gradient is None else tensor.gradient
        gradient = gradient.astype(np.float64)
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
