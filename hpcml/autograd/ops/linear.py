"""Matrix products."""

from __future__ import annotations

import math

from hpcml import kernels
from hpcml.autograd.ops.pointwise import contiguous
from hpcml.autograd.primitive import Context, primitive
from hpcml.backend import Array, xp


def _rows(x: Array) -> Array:
    """x (..., n) as a matrix (rows, n)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@primitive
def linear(ctx: Context, x: Array, weight: Array, bias: Array | None) -> Array:
    """x weight^T + bias: x (..., in), weight (out, in), bias (out) or None -> (..., out)."""
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear(x {x.shape}, weight {weight.shape}): the last size of x must be the second of "
            "weight"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"linear(x of {x.dtype}, weight of {weight.dtype}): convert one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear(weight {weight.shape}, bias {bias.shape}): bias must be (out,)")
    ctx.save(x, weight)
    out = ctx.empty((*x.shape[:-1], weight.shape[0]), x)
    xp(x).matmul(_rows(x), weight.T, out=_rows(out))
    if bias is not None:
        kernels.of(out).add_bias(_rows(out), bias)
    return out


@linear.adjoint
def linear_x(ctx: Context, g: Array) -> Array:
    _, weight = ctx.saved
    out = ctx.empty(ctx.shapes[0], g)
    xp(g).matmul(_rows(g), weight, out=_rows(out))
    return out


@linear.adjoint
def linear_weight(ctx: Context, g: Array) -> Array:
    x, _ = ctx.saved
    return xp(g).matmul(_rows(g).T, _rows(x), out=ctx.empty(ctx.shapes[1], g))


@linear.adjoint
def linear_bias(ctx: Context, g: Array) -> Array:
    out = ctx.empty(ctx.shapes[2], g)
    kernels.of(g).column_sums(contiguous(_rows(g)), out)
    return out


@primitive
def matmul(ctx: Context, a: Array, b: Array) -> Array:
    """Matrix product over the last two dimensions, the others broadcast (NumPy's rules)."""
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError("needs at least one dimension on both sides")
    ctx.save(a, b)
    return xp(a).asarray(xp(a).matmul(a, b))


def _matrices(ctx: Context, g: Array) -> tuple[Array, Array, Array]:
    """(a, b, g) with vectors made matrices: the missing dimension put back as size 1."""
    a, b = ctx.saved
    if a.ndim == 1:
        a, g = a[None, :], xp(g).expand_dims(g, -2 if b.ndim > 1 else 0)
    if b.ndim == 1:
        b, g = b[:, None], xp(g).expand_dims(g, -1)
    return a, b, g


@matmul.adjoint
def matmul_a(ctx: Context, g: Array) -> Array:
    a, b, g = _matrices(ctx, g)
    grad = xp(g).matmul(g, b.swapaxes(-1, -2))
    return ctx.fit(grad.reshape(grad.shape[:-2] + grad.shape[-1:]) if len(ctx.shapes[0]) == 1 else grad, 0)


@matmul.adjoint
def matmul_b(ctx: Context, g: Array) -> Array:
    a, b, g = _matrices(ctx, g)
    grad = xp(g).matmul(a.swapaxes(-1, -2), g)
    return ctx.fit(grad[..., 0] if len(ctx.shapes[1]) == 1 else grad, 1)
