"""Matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.autograd.halves import HALVES, widened
from hpcml.autograd.ops.arrays import contiguous, same_type
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context
from hpcml.backend import Array, xp


def _rows(x: Array) -> Array:
    """x (..., n) as a contiguous matrix (rows, n); bfloat16 as the words that its kernels take."""
    if x.ndim != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _words(contiguous(x))


def _words(x: Array) -> Array:
    return x.view(np.uint16) if x.dtype in HALVES and isinstance(x, np.ndarray) else x


def _kernels(x: Array) -> Any:
    words = x.dtype in HALVES and isinstance(x, np.ndarray)
    return kernels.compiled("float32").brain if words else kernels.of(x)


def check(x: Array, weight: Array, bias: Array | None) -> None:
    """Raise ValueError unless these are operands of `linear`."""
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear(x {x.shape}, weight {weight.shape}): the last size of x must be the second of "
            "weight"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear(weight {weight.shape}, bias {bias.shape}): bias must be (out,)")


def product(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    """out = x weight^T + bias: what `linear` computes, into an array that is there."""
    rows = _rows(x)
    added = rows[:0].reshape(-1) if bias is None else _words(contiguous(bias))
    _kernels(x).linear(rows, _rows(weight), added, _rows(out))


def input_gradient(g: Array, weight: Array, out: Array) -> None:
    """out = g weight: g (..., out), weight (out, in), out (..., in)."""
    _kernels(g).linear_input_gradient(_rows(g), _rows(weight), _rows(out))


def weight_gradient(g: Array, x: Array, out: Array) -> None:
    """out = g^T x, over all rows: g (..., out), x (..., in), out (out, in)."""
    _kernels(g).linear_weight_gradient(_rows(g), _rows(x), _rows(out))


def bias_gradient(g: Array, out: Array) -> None:
    """The sum of all rows: g (..., out), on the CPU not of 16 bits, out (out)."""
    kernels.of(g).column_sums(_rows(g), out)


@primitive
def linear(ctx: Context, x: Array, weight: Array, bias: Array | None) -> Array:
    """x weight^T + bias: x (..., in), weight (out, in), bias (out) or None -> (..., out)."""
    check(x, weight, bias)
    same_type(ctx, "x", "weight", "bias")
    ctx.save(x if ctx.needs[1] else None, weight if ctx.needs[0] else None)
    out = ctx.empty((*x.shape[:-1], weight.shape[0]), x)
    product(x, weight, bias, out)
    return out


linear.takes = kernels.multiplies
linear.on_device = True


@linear.adjoint
def linear_x(ctx: Context, g: Array) -> Array:
    _, weight = ctx.saved
    out = ctx.empty(ctx.shapes[0], g)
    input_gradient(g, weight, out)
    return out


@linear.adjoint
def linear_weight(ctx: Context, g: Array) -> Array:
    x, _ = ctx.saved
    out = ctx.empty(ctx.shapes[1], g)
    weight_gradient(g, x, out)
    return out


@linear.adjoint
def linear_bias(ctx: Context, g: Array) -> Array:
    g = widened(g) if isinstance(g, np.ndarray) else g
    out = ctx.empty(ctx.shapes[2], g)
    bias_gradient(g, out)
    return out


@primitive
def matmul(ctx: Context, a: Array, b: Array) -> Array:
    """Matrix product over the last two dimensions, the others broadcast (NumPy's rules)."""
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError("needs at least one dimension on both sides")
    same_type(ctx, "a", "b")
    ctx.save(a if ctx.needs[1] else None, b if ctx.needs[0] else None)
    m = xp(a)
    if a.ndim == 1 or b.ndim == 1 or a.shape[-1] != b.shape[-2]:
        return m.asarray(m.matmul(a, b))
    batch = () if a.ndim == 2 == b.ndim else m.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return _product(a, b, ctx.empty((*batch, a.shape[-2], b.shape[-1]), a))


def _product(a: Array, b: Array, out: Array) -> Array:
    kernels.of(a).matmul(a, b, out)
    return out


def _as_matrices(ctx: Context, g: Array) -> Array:
    """g of the product of matrices: the dimensions that vectors lack put back as size 1."""
    a, b = (len(shape) for shape in ctx.shapes)
    if a == 1:
        g = xp(g).expand_dims(g, -2 if b > 1 else 0)
    return xp(g).expand_dims(g, -1) if b == 1 else g


@matmul.adjoint
def matmul_a(ctx: Context, g: Array) -> Array:
    _, b = ctx.saved
    b = b[:, None] if b.ndim == 1 else b
    gradient = xp(g).matmul(_as_matrices(ctx, g), b.swapaxes(-1, -2))
    return ctx.fit(gradient[..., 0, :] if len(ctx.shapes[0]) == 1 else gradient, 0)


@matmul.adjoint
def matmul_b(ctx: Context, g: Array) -> Array:
    a, _ = ctx.saved
    a = a[None, :] if a.ndim == 1 else a
    gradient = xp(g).matmul(a.swapaxes(-1, -2), _as_matrices(ctx, g))
    return ctx.fit(gradient[..., 0] if len(ctx.shapes[1]) == 1 else gradient, 1)
