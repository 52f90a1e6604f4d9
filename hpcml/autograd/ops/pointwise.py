"""Element-wise operations with broadcasting."""

from __future__ import annotations

from typing import Any

from hpcml import kernels
from hpcml.autograd.halves import HALVES, narrowed, widened
from hpcml.autograd.ops.arrays import flat, promoted
from hpcml.autograd.primitives import movement, primitive
from hpcml.autograd.record import Context
from hpcml.backend import Array, xp


def evaluate(ctx: Context, name: str, *arrays: Any) -> Array:
    """Evaluate a ufunc, into counted memory where the result is of floats."""
    types = {d for d in ctx.dtypes if d is not None}
    if len(types) > 1 or next(iter(types)).kind in "biu":
        arrays = promoted(name, arrays)
    first = next(a for a in arrays if hasattr(a, "dtype"))
    function = getattr(xp(first), name)
    if first.dtype.kind in "biu":
        return function(*arrays)
    shapes = [shape for shape in ctx.shapes if shape]
    if shapes and shapes.count(shapes[0]) == len(shapes):
        shape = shapes[0]
    else:
        shape = xp(first).broadcast(*arrays).shape
    out = ctx.like(first) if first.shape == shape else ctx.empty(shape, first)
    return function(*arrays, out=out)


def times(ctx: Context, g: Array, factor: Any) -> Array:
    """g * factor, which broadcasts to g, in counted memory."""
    return xp(g).multiply(g, factor, out=ctx.like(g))


@primitive
def add(ctx: Context, a: Array, b: Array) -> Array:
    """a + b."""
    return evaluate(ctx, "add", a, b)


add.on_device = True


@add.adjoint
def add_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 0)


@add.adjoint
def add_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 1)


@primitive
def sub(ctx: Context, a: Array, b: Array) -> Array:
    """a - b."""
    return evaluate(ctx, "subtract", a, b)


@sub.adjoint
def sub_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(g, 0)


@sub.adjoint
def sub_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(xp(g).negative(g, out=ctx.like(g)), 1)


@primitive
def mul(ctx: Context, a: Array, b: Array) -> Array:
    """a * b."""
    for_a, for_b = ctx.needs
    ctx.save(a if for_b else None, b if for_a else None)
    return evaluate(ctx, "multiply", a, b)


@mul.adjoint
def mul_a(ctx: Context, g: Array) -> Array:
    _, b = ctx.saved
    return ctx.fit(times(ctx, g, b), 0)


@mul.adjoint
def mul_b(ctx: Context, g: Array) -> Array:
    a, _ = ctx.saved
    return ctx.fit(times(ctx, g, a), 1)


@primitive
def div(ctx: Context, a: Array, b: Array) -> Array:
    """a / b."""
    ctx.save(a if ctx.needs[1] else None, b)
    return evaluate(ctx, "true_divide", a, b)


@div.adjoint
def div_a(ctx: Context, g: Array) -> Array:
    _, b = ctx.saved
    return ctx.fit(xp(g).true_divide(g, b, out=ctx.like(g)), 0)


@div.adjoint
def div_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return ctx.fit(-g * a / (b * b), 1)


@primitive
def power(ctx: Context, a: Array, b: Array) -> Array:
    """a ** b."""
    ctx.save(a, b)
    return evaluate(ctx, "power", a, b)


@power.adjoint
def power_a(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    if hasattr(b, "dtype"):
        power = a ** xp(b).where(b == 0, 1, b - 1)  # so that 0 ** 0 has no infinite slope
    else:
        power = a ** (b - 1 if b else 1)
    return ctx.fit(times(ctx, g, b * power), 0)


@power.adjoint
def power_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    m = xp(g)
    vanishes = (a == 0) & (b >= 0)  # there the logarithm does not exist
    return ctx.fit(times(ctx, g, a**b * m.log(m.where(vanishes, 1, a))), 1)


@primitive
def neg(ctx: Context, a: Array) -> Array:
    """-a."""
    return evaluate(ctx, "negative", a)


@neg.adjoint
def neg_a(ctx: Context, g: Array) -> Array:
    return xp(g).negative(g, out=ctx.like(g))


@primitive
def exp(ctx: Context, a: Array) -> Array:
    """e ** a."""
    out = evaluate(ctx, "exp", a)
    ctx.save(out)
    return out


@exp.adjoint
def exp_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return times(ctx, g, out)


@primitive
def log(ctx: Context, a: Array) -> Array:
    """Natural logarithm."""
    ctx.save(a)
    return evaluate(ctx, "log", a)


@log.adjoint
def log_a(ctx: Context, g: Array) -> Array:
    (a,) = ctx.saved
    return xp(g).true_divide(g, a, out=ctx.like(g))


@primitive
def sqrt(ctx: Context, a: Array) -> Array:
    """Square root."""
    out = evaluate(ctx, "sqrt", a)
    ctx.save(out)
    return out


@sqrt.adjoint
def sqrt_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return xp(g).true_divide(g, 2 * out, out=ctx.like(g))


@primitive
def absolute(ctx: Context, a: Array) -> Array:
    """|a|; the gradient at 0 is 0."""
    ctx.save(a)
    return evaluate(ctx, "absolute", a)


@absolute.adjoint
def absolute_a(ctx: Context, g: Array) -> Array:
    (a,) = ctx.saved
    return times(ctx, g, xp(g).sign(a))


@primitive
def tanh(ctx: Context, a: Array) -> Array:
    """Hyperbolic tangent."""
    out = evaluate(ctx, "tanh", a)
    ctx.save(out)
    return out


@tanh.adjoint
def tanh_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return times(ctx, g, 1 - out * out)


@primitive
def sigmoid(ctx: Context, a: Array) -> Array:
    """1 / (1 + e ** -a), by tanh, which cannot overflow."""
    out = evaluate(ctx, "multiply", a, 0.5)
    xp(out).tanh(out, out=out)
    out *= 0.5
    out += 0.5
    ctx.save(out)
    return out


@sigmoid.adjoint
def sigmoid_a(ctx: Context, g: Array) -> Array:
    (out,) = ctx.saved
    return times(ctx, g, out * (1 - out))


@primitive
def relu(ctx: Context, a: Array) -> Array:
    """max(a, 0); the gradient at 0 is 0, at NaN that of the result."""
    out = evaluate(ctx, "maximum", a, 0)
    ctx.save(out)
    return out


@relu.adjoint
def relu_a(ctx: Context, g: Array) -> Array:
    (y,) = ctx.saved
    out = ctx.like(y)
    kernels.of(g).relu_backward(flat(g, y), flat(y, y), flat(out, y))
    return out


@primitive
def where(ctx: Context, a: Array, b: Array, *, condition: Array) -> Array:
    """a where `condition` holds, b elsewhere."""
    ctx.attributes = condition
    pair = promoted("where", (a, b))
    kind = next(x.dtype for x in pair if hasattr(x, "dtype"))
    if kind.kind not in "biu":  # bfloat16 and a plain number would make float64
        pair = tuple([x if hasattr(x, "dtype") else kind.type(x) for x in pair])
    return xp(condition).where(condition, *pair)


@where.adjoint
def where_a(ctx: Context, g: Array) -> Array:
    return ctx.fit(xp(g).where(ctx.attributes, g, 0), 0)


@where.adjoint
def where_b(ctx: Context, g: Array) -> Array:
    return ctx.fit(xp(g).where(ctx.attributes, 0, g), 1)


@movement
def cast(ctx: Context, x: Array, *, dtype: Any) -> Array:
    """x with elements of another float type; the gradient is cast back, as every gradient is."""
    if x.dtype != dtype and dtype in HALVES:
        return narrowed(x, dtype)
    return x if x.dtype == dtype else widened(x).astype(dtype, copy=False)


@cast.adjoint
def cast_x(ctx: Context, g: Array) -> Array:
    return g
