"""Element-wise operations with broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.autograd.primitive import Context, primitive
from hpcml.backend import Array, xp


def _apply(ctx: Context, name: str, *arrays: Any) -> Array:
    """Evaluate a ufunc, into counted memory where the result's type is that of the inputs."""
    first = next(a for a in arrays if hasattr(a, "dtype"))
    same = first.dtype.kind == "f" and all(
        a.dtype == first.dtype if hasattr(a, "dtype") else isinstance(a, int | float) for a in arrays
    )
    function = getattr(xp(first), name)
    if not same:
        return function(*arrays)
    shape = first.shape
    if any(np.shape(a) != shape for a in arrays[1:]):
        shape = np.broadcast_shapes(*[np.shape(a) for a in arrays])
    return function(*arrays, out=ctx.empty(shape, first))


@primitive
def add(ctx: Context, a: Array, b: Array) -> Array:
    """a + b."""
    return _apply(ctx, "add", a, b)


@add.adjoint
def add_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 0)


@add.adjoint
def add_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 1)


@primitive
def sub(ctx: Context, a: Array, b: Array) -> Array:
    """a - b."""
    return _apply(ctx, "subtract", a, b)


@sub.adjoint
def sub_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 0)


@sub.adjoint
def sub_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(-g, 1)


@primitive
def mul(ctx: Context, a: Array, b: Array) -> Array:
    """a * b."""
    ctx.save(a, b)
    return _apply(ctx, "multiply", a, b)


@mul.adjoint
def mul_a(ctx: Context, g: Array) -> Array:
    _, b = ctx.saved
    return ctx.fit(g * b, 0)


@mul.adjoint
def mul_b(ctx: Context, g: Array) -> Array:
    a, _ = ctx.saved
    return ctx.fit(g * a, 1)


@primitive
def div(ctx: Context, a: Array, b: Array) -> Array:
    """a / b."""
    ctx.save(a, b)
    return _apply(ctx, "true_divide", a, b)


@div.adjoint
def div_a(ctx: Context, g: Array) -> Array:
    _, b = ctx.saved
    return ctx.fit(g / b, 0)


@div.adjoint
def div_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return ctx.fit(-g * a / (b * b), 1)


@primitive
def power(ctx: Context, a: Array, b: Array) -> Array:
    """a ** b."""
    ctx.save(a, b)
    return _apply(ctx, "power", a, b)


@power.adjoint
def power_a(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return ctx.fit(g * b * a ** (b - 1), 0)


@power.adjoint
def power_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    m = xp(g)
    return ctx.fit(g * a**b * m.log(m.where(a > 0, a, 1)), 1)


@primitive
def neg(ctx: Context, a: Array) -> Array:
    """-a."""
    return _apply(ctx, "negative", a)


@neg.adjoint
def neg_a(ctx: Context, g: Array) -> Array:
    return -g


@primitive
def exp(ctx: Context, a: Array) -> Array:
    """e ** a."""
    out = _apply(ctx, "exp", a)
    ctx.save(out)
    return out


@exp.adjoint
def exp_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return g * out


@primitive
def log(ctx: Context, a: Array) -> Array:
    """Natural logarithm."""
    ctx.save(a)
    return _apply(ctx, "log", a)


@log.adjoint
def log_a(ctx: Context, g: Array) -> Array:
    (a,) = ctx.saved
    return g / a


@primitive
def sqrt(ctx: Context, a: Array) -> Array:
    """Square root."""
    out = _apply(ctx, "sqrt", a)
    ctx.save(out)
    return out


@sqrt.adjoint
def sqrt_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return g / (2 * out)


@primitive
def absolute(ctx: Context, a: Array) -> Array:
    """|a|; the gradient at 0 is 0."""
    ctx.save(a)
    return _apply(ctx, "absolute", a)


@absolute.adjoint
def absolute_a(ctx: Context, g: Array) -> Array:
    (a,) = ctx.saved
    return g * xp(g).sign(a)


@primitive
def tanh(ctx: Context, a: Array) -> Array:
    """Hyperbolic tangent."""
    out = _apply(ctx, "tanh", a)
    ctx.save(out)
    return out


@tanh.adjoint
def tanh_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return g * (1 - out * out)


@primitive
def sigmoid(ctx: Context, a: Array) -> Array:
    """1 / (1 + e ** -a), by tanh, which cannot overflow."""
    out = _apply(ctx, "multiply", a, 0.5)
    xp(a).tanh(out, out=out)
    out *= 0.5
    out += 0.5
    ctx.save(out)
    return out


@sigmoid.adjoint
def sigmoid_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return g * out * (1 - out)


@primitive
def relu(ctx: Context, a: Array) -> Array:
    """max(a, 0); the gradient at 0 is 0."""
    out = _apply(ctx, "maximum", a, 0)
    ctx.save(out)
    return out


@relu.adjoint
def relu_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return g * (out > 0)


@primitive
def maximum(ctx: Context, a: Array, b: Array) -> Array:
    """The larger of a and b; where they are equal each gets half of the gradient."""
    ctx.save(a, b)
    return _apply(ctx, "maximum", a, b)


@maximum.adjoint
def maximum_a(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return ctx.fit(g * ((a > b) + 0.5 * (a == b)).astype(g.dtype), 0)


@maximum.adjoint
def maximum_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return ctx.fit(g * ((b > a) + 0.5 * (a == b)).astype(g.dtype), 1)


@primitive
def where(ctx: Context, a: Array, b: Array, *, condition: Array) -> Array:
    """a where `condition` holds, b elsewhere."""
    ctx.attributes = condition
    return xp(condition).where(condition, a, b)


@where.adjoint
def where_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(xp(g).where(ctx.attributes, g, 0), 0)


@where.adjoint
def where_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(xp(g).where(ctx.attributes, 0, g), 1)


@primitive
def gelu(ctx: Context, x: Array, *, approximate: str = "none") -> Array:
    """x Phi(x), or its tanh form (Hendrycks and Gimpel 2016)."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate="{approximate}": use "none" or "tanh"')
    x = contiguous(x)
    ctx.save(x)
    ctx.attributes = approximate
    out = ctx.empty(x.shape, x)
    kernel = kernels.of(x)
    (kernel.gelu if approximate == "none" else kernel.gelu_tanh)(x.reshape(-1), out.reshape(-1))
    return out


@gelu.adjoint
def gelu_x(ctx: Context, g: Array) -> Array:
    (x,) = ctx.saved
    out = ctx.empty(x.shape, x)
    k = kernels.of(x)
    kernel = k.gelu_backward if ctx.attributes == "none" else k.gelu_tanh_backward
    kernel(contiguous(g).reshape(-1), x.reshape(-1), out.reshape(-1))
    return out


@primitive
def cast(ctx: Context, x: Array, *, dtype: Any) -> Array:
    """x with elements of another float type; the gradient is cast back."""
    ctx.attributes = x.dtype
    return x.astype(dtype)


@cast.adjoint
def cast_x(ctx: Context, g: Array) -> Array:
    return g.astype(ctx.attributes)


def contiguous(x: Array) -> Array:
    """Return x, or a copy of it if its elements do not lie in order."""
    return x if x.flags.c_contiguous else xp(x).ascontiguousarray(x)
