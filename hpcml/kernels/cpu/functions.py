"""Elementary functions that vectorise: numba has no vector math library, and libm's are scalar.

Each is generic: float32 takes the fast form, float64 (used for checks) calls libm.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from hpcml.kernels.cpu.jit import lanes

f4 = np.float32


@intrinsic
def _as_int32(typingctx: Any, number: Any) -> Any:
    """Read the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _as_float32(typingctx: Any, bits: Any) -> Any:
    """Read the bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _maximum(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of two numbers, NaN if either is: unlike Python's `max` it vectorises."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        kind = ir.FunctionType(real, [real, real])
        return builder.call(builder.module.declare_intrinsic("llvm.maximum", [real], kind), args)

    return x(x, x), generate


def exp(x: Any) -> Any:
    """Exponential; float32: relative error below 2e-7, NaN stays NaN, underflow gives 0."""
    raise AssertionError("compiled code only")


@overload(exp)
def _exp(x: Any) -> Any:
    if x != types.float32:

        def exp64(x: Any) -> Any:
            return math.exp(x)

        return exp64

    log2e, magic = f4(1.4426950408889634), f4(12582912.0)  # 1.5 * 2**23 rounds to an integer
    high, low = f4(0.693359375), f4(-2.12194440e-4)  # ln 2 in two parts
    c0, c1, c2 = f4(1.9875691500e-4), f4(1.3981999507e-3), f4(8.3334519073e-3)
    c3, c4, c5 = f4(4.1665795894e-2), f4(1.6666665459e-1), f4(5.0000001201e-1)
    least, most, one = f4(-87.33654), f4(88.37626), f4(1)
    zero, infinity, bias = f4(0), f4(np.inf), np.int32(127 << 23)

    def exp32(x: Any) -> Any:
        # Coefficients: S. L. Moshier, Cephes, expf.
        # not min and max: numba's do not vectorise
        y = least if x < least else x  # noqa: FURB136
        y = most if y > most else y  # noqa: FURB136
        shifted = y * log2e + magic
        n = shifted - magic
        r = y - n * high
        r = r - n * low
        p = ((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + c5
        # The last bits of `shifted` are n: moved to the exponent they are 2^n. No conversion to an
        # integer, which NaN would make undefined.
        power = _as_float32(np.int32((_as_int32(shifted) << 23) + bias))
        value = (p * r * r + r + one) * power
        value = zero if x < least else value
        return infinity if x > most else value

    return exp32


def tanh(x: Any) -> Any:
    """Hyperbolic tangent by `exp`; float32: absolute error below 3e-7."""
    raise AssertionError("compiled code only")


@overload(tanh)
def _tanh(x: Any) -> Any:
    if x != types.float32:

        def tanh64(x: Any) -> Any:
            return math.tanh(x)

        return tanh64

    one, two = f4(1), f4(2)

    def tanh32(x: Any) -> Any:
        return one - two / (exp(two * x) + one)

    return tanh32


def normal_cdf_and_pdf(x: Any) -> Any:
    """The standard normal distribution's (cumulative, density) at x; float32: error below 2e-7."""
    raise AssertionError("compiled code only")


@overload(normal_cdf_and_pdf)
def _normal_cdf_and_pdf(x: Any) -> Any:
    if x != types.float32:
        root2, inverse_root2pi = math.sqrt(2), 1 / math.sqrt(2 * math.pi)

        def normal64(x: Any) -> Any:
            return 0.5 * math.erfc(-x / root2), inverse_root2pi * math.exp(-0.5 * x * x)

        return normal64

    a1, a2, a3 = f4(0.254829592), f4(-0.284496736), f4(1.421413741)
    a4, a5, p = f4(-1.453152027), f4(1.061405429), f4(0.3275911)
    half, one, zero = f4(0.5), f4(1), f4(0)
    inverse_root2, inverse_root2pi4 = f4(1 / math.sqrt(2)), f4(1 / math.sqrt(2 * math.pi))

    def normal32(x: Any) -> Any:
        # Abramowitz and Stegun 7.1.26: erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z)
        z = abs(x) * inverse_root2
        bell = exp(-z * z)
        t = one / (one + p * z)
        tail = half * ((((a5 * t + a4) * t + a3) * t + a2) * t + a1) * t * bell
        return (tail if x < zero else one - tail), bell * inverse_root2pi4

    return normal32


@lanes
def row_sum(x: Any, first: int, last: int) -> Any:
    """Sum of x[first:last]."""
    total = x.dtype.type(0)
    for j in range(first, last):
        total += x[j]
    return total


@lanes
def row_max(x: Any, first: int, last: int) -> Any:
    """Maximum of x[first:last], at least one element; NaN if there is one."""
    most = x[first]
    for j in range(first + 1, last):
        most = _maximum(most, x[j])
    return most


@lanes
def row_dot(x: Any, y: Any, n: int) -> Any:
    """Sum of x[j] * y[j] over the first n elements."""
    total = x.dtype.type(0)
    for j in range(n):
        total += x[j] * y[j]
    return total


@lanes
def row_squares(x: Any) -> Any:
    """Sum of squares in float64."""
    total = 0.0
    for j in range(x.size):
        v = np.float64(x[j])
        total += v * v
    return total
