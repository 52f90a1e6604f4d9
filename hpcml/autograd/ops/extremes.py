"""The larger and the smaller: of two tensors, and along dimensions."""

from __future__ import annotations

from typing import Any

from hpcml.autograd.ops.pointwise import evaluate, times
from hpcml.autograd.ops.shape import Axes, axes_of, kept
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context
from hpcml.backend import Array, xp


def _winner(ctx: Context, g: Array, which: int, lost: Array) -> Array:
    """The gradient of an input: nothing where it lost, half where both are equal."""
    a, b = ctx.saved
    return ctx.fit(times(ctx, g, ~lost - 0.5 * (a == b)), which)


@primitive
def maximum(ctx: Context, a: Array, b: Array) -> Array:
    """The larger of a and b; where they are equal each gets half of the gradient."""
    ctx.save(a, b)
    return evaluate(ctx, "maximum", a, b)


@maximum.adjoint
def maximum_a(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return _winner(ctx, g, 0, a < b)


@maximum.adjoint
def maximum_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return _winner(ctx, g, 1, a > b)


@primitive
def minimum(ctx: Context, a: Array, b: Array) -> Array:
    """The smaller of a and b; where they are equal each gets half of the gradient."""
    ctx.save(a, b)
    return evaluate(ctx, "minimum", a, b)


@minimum.adjoint
def minimum_a(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return _winner(ctx, g, 0, a > b)


@minimum.adjoint
def minimum_b(ctx: Context, g: Array) -> Array:
    a, b = ctx.saved
    return _winner(ctx, g, 1, a < b)


def _extreme(ctx: Context, x: Array, name: str, dim: Axes, keepdim: bool) -> Array:
    ctx.attributes = axes = axes_of(dim)
    out = xp(x).asarray(getattr(x, name)(axis=axes, keepdims=keepdim))
    ctx.save(x, out)
    return out


def _shares(ctx: Context, g: Array) -> Array:
    """The gradient of an extreme, in equal parts to all elements that equal it."""
    x, out = ctx.saved
    axes: Any = ctx.attributes
    shape = kept(x.shape, axes)
    chosen = x == out.reshape(shape)
    each = g.reshape(shape) / chosen.sum(axis=axes, keepdims=True)
    return xp(x).multiply(chosen, each, out=ctx.empty(x.shape, x))


@primitive
def amax(ctx: Context, x: Array, *, dim: Axes = None, keepdim: bool = False) -> Array:
    """Maximum over `dim` (all by default); equal maxima share the gradient equally."""
    return _extreme(ctx, x, "max", dim, keepdim)


@primitive
def amin(ctx: Context, x: Array, *, dim: Axes = None, keepdim: bool = False) -> Array:
    """Minimum over `dim` (all by default); equal minima share the gradient equally."""
    return _extreme(ctx, x, "min", dim, keepdim)


amax.adjoint(_shares)
amin.adjoint(_shares)
