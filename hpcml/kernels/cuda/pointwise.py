"""Element-wise kernels: GELU, the update of optimizers, sums of squares."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.kernels.cuda.launch import launch, over, sum_type

_SOURCE = "pointwise.cu"


def _map(name: str, *arrays: Array) -> None:
    out = arrays[-1]
    over(_SOURCE, name, out, out.size, *arrays, np.int64(out.size))


def gelu(x: Array, out: Array) -> None:
    """out = x Phi(x) (Hendrycks and Gimpel 2016)."""
    _map("gelu", x, out)


def gelu_backward(g: Array, x: Array, out: Array) -> None:
    """out = g (Phi(x) + x phi(x))."""
    _map("gelu_backward", g, x, out)


def gelu_tanh(x: Array, out: Array) -> None:
    """out = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    _map("gelu_tanh", x, out)


def gelu_tanh_backward(g: Array, x: Array, out: Array) -> None:
    """out = g d/dx gelu_tanh(x)."""
    _map("gelu_tanh_backward", g, x, out)


def relu_backward(g: Array, y: Array, out: Array) -> None:
    """out = g, but 0 where y = max(x, 0) is 0; at NaN it is g."""
    _map("relu_backward", g, y, out)


def block_squares(x: Array, block: int, out: Array) -> None:
    """out[k] = sum of squares of x[k * block] to x[(k + 1) * block - 1], in float64."""
    launch(_SOURCE, "block_squares", x, (x.size // block,), (256,), x, np.int64(block), out)


def _update(name: str, g: Array, arrays: tuple[Array, ...], *numbers: float, **flags: Any) -> None:
    real = sum_type(g).type
    scalars = [real(number) for number in numbers]
    over(_SOURCE, name, g, g.size, *arrays, np.int64(g.size), *scalars, *flags.values())


def adam_update(
    p: Array, g: Array, m: Array, v: Array,
    scale: float, lr: float, beta1: float, beta2: float, eps: float, decay: float,
    correct1: float, correct2: float, decoupled: bool,
) -> None:  # fmt: skip
    """One step of Adam or AdamW; see `cpu`. g may have 16 bits where p, m and v have float32."""
    _update(
        "adam_update", g, (p, g, m, v), scale, lr, beta1, beta2, eps, decay, correct1, correct2,
        decoupled=np.bool_(decoupled),
    )  # fmt: skip


def sgd_update(
    p: Array, g: Array, velocity: Array,
    scale: float, lr: float, momentum: float, rest: float, decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """One step of SGD with momentum: velocity = momentum velocity + rest (g scale + decay p)."""
    _update(
        "sgd_update", g, (p, g, velocity), scale, lr, momentum, rest, decay,
        nesterov=np.bool_(nesterov),
    )  # fmt: skip


def sgd_plain_update(p: Array, g: Array, scale: float, lr: float, decay: float) -> None:
    """One step of SGD without momentum: p -= lr (g scale + decay p)."""
    _update("sgd_plain_update", g, (p, g), scale, lr, decay)
