"""Element-wise kernels: GELU, sums over columns, the update of optimizers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.kernels.cpu.functions import normal_cdf_and_pdf, row_squares, tanh
from hpcml.kernels.cpu.team import columns, divided, elements

_ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


@divided("void(R[::1], T[::1])", elements)
def gelu(x: Any, out: Any, low: int, high: int) -> None:
    """out = x Phi(x) (Hendrycks and Gimpel 2016)."""
    x, out = x[low:high], out[low:high]
    for i in range(x.size):
        v = x[i]  # read once: twice would halve the speed
        cdf, _ = normal_cdf_and_pdf(v)
        out[i] = v * cdf


@divided("void(R[::1], R[::1], T[::1])", elements)
def gelu_backward(g: Any, x: Any, out: Any, low: int, high: int) -> None:
    """out = g (Phi(x) + x phi(x))."""
    g, x, out = g[low:high], x[low:high], out[low:high]
    for i in range(x.size):
        v = x[i]
        cdf, pdf = normal_cdf_and_pdf(v)
        out[i] = g[i] * (cdf + v * pdf)


@divided("void(R[::1], T[::1])", elements)
def gelu_tanh(x: Any, out: Any, low: int, high: int) -> None:
    """out = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    x, out = x[low:high], out[low:high]
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    a, b = x.dtype.type(_ROOT_2_OVER_PI), x.dtype.type(_ROOT_2_OVER_PI * _CUBIC)
    for i in range(x.size):
        v = x[i]
        out[i] = half * v * (one + tanh(v * (a + b * v * v)))


@divided("void(R[::1], R[::1], T[::1])", elements)
def gelu_tanh_backward(g: Any, x: Any, out: Any, low: int, high: int) -> None:
    """out = g d/dx gelu_tanh(x)."""
    g, x, out = g[low:high], x[low:high], out[low:high]
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    a, b = x.dtype.type(_ROOT_2_OVER_PI), x.dtype.type(_ROOT_2_OVER_PI * _CUBIC)
    b3 = x.dtype.type(3 * _ROOT_2_OVER_PI * _CUBIC)
    for i in range(x.size):
        v = x[i]
        t = tanh(v * (a + b * v * v))
        out[i] = g[i] * half * (one + t + v * (one - t * t) * (a + b3 * v * v))


@divided("void(R[::1], R[::1], T[::1])", elements)
def relu_backward(g: Any, y: Any, out: Any, low: int, high: int) -> None:
    """out = g, but 0 where y = max(x, 0) is 0; at NaN it is g."""
    g, y, out = g[low:high], y[low:high], out[low:high]
    zero = g.dtype.type(0)
    for i in range(g.size):
        v = g[i]
        out[i] = zero if y[i] <= zero else v


@divided("void(R[:, ::1], T[::1])", columns, ranges=1)
def column_sums(x: Any, out: Any, low: int, high: int) -> None:
    """out[j] = sum of x[r, j] over rows, added in order."""
    total = out[low:high]
    total[:] = out.dtype.type(0)
    for r in range(x.shape[0]):
        row = x[r, low:high]
        for j in range(row.size):
            total[j] += row[j]


@divided("void(R[::1], int64, float64[::1])", lambda x, block, out: (x.size // block, x.size))
def block_squares(x: Any, block: int, out: Any, low: int, high: int) -> None:
    """out[k] = sum of squares of x[k * block] to x[(k + 1) * block - 1], in float64."""
    for k in range(low, high):
        out[k] = row_squares(x[k * block : (k + 1) * block])


@divided("void(T[::1], R[::1], T[::1], T[::1], T, T, T, T, T, T, T, T, boolean)", elements)
def adam_update(
    p: Any, g: Any, m: Any, v: Any,
    scale: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, decay: Any, correct1: Any, correct2: Any,
    decoupled: bool, low: int, high: int,
) -> None:  # fmt: skip
    """One step of Adam (Kingma and Ba 2015) or, if `decoupled`, AdamW (Loshchilov and Hutter 2019).

    The gradient is g * scale; correct1 = 1 - beta1^t and correct2 = sqrt(1 - beta2^t).
    """
    p, g, m, v = p[low:high], g[low:high], m[low:high], v[low:high]
    one = p.dtype.type(1)
    keep = one - lr * decay if decoupled else one
    couple = p.dtype.type(0) if decoupled else decay
    step = lr / correct1
    rest1, rest2, inverse2 = one - beta1, one - beta2, one / correct2
    for i in range(p.size):
        gradient = g[i] * scale + couple * p[i]
        m[i] = beta1 * m[i] + rest1 * gradient
        v[i] = beta2 * v[i] + rest2 * gradient * gradient
        p[i] = keep * p[i] - step * m[i] / (np.sqrt(v[i]) * inverse2 + eps)


@divided("void(T[::1], R[::1], T[::1], T, T, T, T, T, boolean)", elements)
def sgd_update(
    p: Any, g: Any, velocity: Any,
    scale: Any, lr: Any, momentum: Any, rest: Any, decay: Any, nesterov: bool, low: int, high: int,
) -> None:  # fmt: skip
    """One step of SGD with momentum: velocity = momentum velocity + rest (g scale + decay p)."""
    p, g, velocity = p[low:high], g[low:high], velocity[low:high]
    zero, one = p.dtype.type(0), p.dtype.type(1)
    own, along = (one, momentum) if nesterov else (zero, one)
    for i in range(p.size):
        gradient = g[i] * scale + decay * p[i]
        velocity[i] = momentum * velocity[i] + rest * gradient
        p[i] -= lr * (own * gradient + along * velocity[i])


@divided("void(T[::1], T[::1], T, T, T)", elements)
def sgd_plain_update(p: Any, g: Any, scale: Any, lr: Any, decay: Any, low: int, high: int) -> None:
    """One step of SGD without momentum: p -= lr (g scale + decay p)."""
    p, g = p[low:high], g[low:high]
    for i in range(p.size):
        p[i] -= lr * (g[i] * scale + decay * p[i])
