"""Reductions, and operations that only move elements."""

from __future__ import annotations

from builtins import sum as _total
from typing import Any

import numpy as np

from hpcml.autograd.halves import widened
from hpcml.autograd.ops.arrays import unbroadcast
from hpcml.autograd.primitives import movement, primitive
from hpcml.autograd.record import Context
from hpcml.backend import Array, order, xp

Axes = int | tuple[int, ...] | list[int] | None


def axes_of(dim: Axes) -> int | tuple[int, ...] | None:
    """Dimensions as NumPy takes them; none are all, as in PyTorch."""
    return dim if isinstance(dim, int) else tuple(dim or ()) or None


def kept(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """`shape` with 1 along the reduced axes."""
    if axes is None:
        return (1,) * len(shape)
    chosen = {a % len(shape) for a in ((axes,) if isinstance(axes, int) else axes)}
    return tuple(1 if i in chosen else n for i, n in enumerate(shape))


def _spread(ctx: Context, g: Array, axes: Axes) -> Array:
    """The gradient of a reduction, broadcast back to the input's shape."""
    shape = ctx.shapes[0]
    return xp(g).broadcast_to(g.reshape(kept(shape, axes)), shape)


@primitive
def sum(ctx: Context, x: Array, *, dim: Axes = None, keepdim: bool = False) -> Array:
    """Sum over `dim` (all by default)."""
    ctx.attributes = dim = axes_of(dim)
    return xp(x).asarray(x.sum(axis=dim, keepdims=keepdim))


@sum.adjoint
def sum_x(ctx: Context, g: Array) -> Array:
    return _spread(ctx, g, ctx.attributes)


@primitive
def mean(ctx: Context, x: Array, *, dim: Axes = None, keepdim: bool = False) -> Array:
    """Mean over `dim` (all by default)."""
    dim = axes_of(dim)
    if x.size:
        out = xp(x).asarray(x.mean(axis=dim, keepdims=keepdim))
    else:  # NaN, for which NumPy would warn
        out = xp(x).asarray(x.sum(axis=dim, keepdims=keepdim) + np.nan)
    ctx.attributes = dim, max(x.size // max(out.size, 1), 1)
    return out


@mean.adjoint
def mean_x(ctx: Context, g: Array) -> Array:
    dim, count = ctx.attributes
    return _spread(ctx, g / count, dim)


@movement
def reshape(ctx: Context, x: Array, *, shape: tuple[int, ...]) -> Array:
    """The same elements in another shape; one size may be -1."""
    return x.reshape(shape)


@reshape.adjoint
def reshape_x(ctx: Context, g: Array) -> Array:
    return g.reshape(ctx.shapes[0])


@movement
def permute(ctx: Context, x: Array, *, dims: tuple[int, ...]) -> Array:
    """Reorder the dimensions: dimension i of the result is dimension dims[i]."""
    ctx.attributes = tuple(int(i) for i in np.argsort([d % x.ndim for d in dims]))
    return x.transpose(dims)


@permute.adjoint
def permute_x(ctx: Context, g: Array) -> Array:
    return g.transpose(ctx.attributes)


@movement
def expand(ctx: Context, x: Array, *, shape: tuple[int, ...]) -> Array:
    """Repeat along dimensions of size 1, without a copy; -1 keeps a size."""
    lead = len(shape) - x.ndim
    if -1 in shape[: max(lead, 0)]:
        raise ValueError(f"expand to {shape}: -1 keeps a size, and the first {lead} are new")
    full = tuple(x.shape[i - lead] if n == -1 else n for i, n in enumerate(shape))
    return xp(x).broadcast_to(x, full)


@expand.adjoint
def expand_x(ctx: Context, g: Array) -> Array:
    return unbroadcast(widened(g), ctx.shapes[0])


@movement
def getitem(ctx: Context, x: Array, *, index: Any) -> Array:
    """x[index]: slices, integers, None, masks and integer arrays, as in NumPy."""
    ctx.attributes = index
    return xp(x).asarray(x[index])


@getitem.adjoint
def getitem_x(ctx: Context, g: Array) -> Array:
    index = ctx.attributes
    parts = index if isinstance(index, tuple) else (index,)
    several = any(hasattr(p, "dtype") for p in parts)  # an element may be chosen several times
    g = widened(g) if several else g
    out = ctx.accumulator(ctx.shapes[0], g)
    if several:
        xp(g).add.at(out, index, g)
    else:
        out[index] += g
    return out


def cat(tensors: list[Any], dim: int = 0) -> Any:
    """Join tensors along `dim`; the other sizes must agree."""
    return _concatenation(len(tensors))(*tensors, dim=dim)


_CONCATENATIONS: dict[int, Any] = {}


def _concatenation(count: int) -> Any:
    """The primitive that joins `count` tensors: an adjoint for each."""
    if count in _CONCATENATIONS:
        return _CONCATENATIONS[count]

    def cat(ctx: Context, *arrays: Array, dim: int = 0) -> Array:
        ctx.attributes = dim
        return xp(arrays[0]).concatenate(arrays, axis=dim)

    def adjoint(which: int) -> Any:
        def part(ctx: Context, g: Array) -> Array:
            dim = ctx.attributes % g.ndim
            start = _total(shape[dim] for shape in ctx.shapes[:which])
            index = [slice(None)] * g.ndim
            index[dim] = slice(start, start + ctx.shapes[which][dim])
            return g[tuple(index)]

        return part

    made = movement(cat)
    for which in range(count):
        made.adjoint(adjoint(which))
    _CONCATENATIONS[count] = made
    return made


_PAD = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""What NumPy calls the ways to pad."""


@movement
def pad(
    ctx: Context, x: Array, *,
    widths: tuple[tuple[int, int], ...], mode: str = "constant", value: float = 0.0,
) -> Array:  # fmt: skip
    """Surround x: widths[i] elements (before, after) along dimension i.

    mode: "constant" (by `value`), "reflect" (the inner elements mirrored, without the outermost),
    "replicate" (the outermost) or "circular" (those of the other side).
    """
    ctx.attributes = widths, mode
    options = {"constant_values": value} if mode == "constant" else {}
    dims = order(x)
    padded = xp(x).pad(x.transpose(dims), [widths[i] for i in dims], _PAD[mode], **options)
    return padded.transpose(np.argsort(dims))


@pad.adjoint
def pad_x(ctx: Context, g: Array) -> Array:
    widths, mode = ctx.attributes
    if mode == "constant":
        pairs = zip(widths, ctx.shapes[0], strict=True)
        return g[tuple(slice(before, before + n) for (before, _), n in pairs)]
    g = widened(g)
    for dim, (before, after) in enumerate(widths):
        if before or after:
            g = _folded(g.swapaxes(0, dim), before, after, mode).swapaxes(0, dim)
    return g


def _folded(g: Array, before: int, after: int, mode: str) -> Array:
    """The gradient of padding along dimension 0: the borders added where they were taken from."""
    end = g.shape[0] - after
    out, low, high = g[before:end].copy("K"), g[:before], g[end:]
    if mode == "replicate":
        out[0] += low.sum(0)
        out[-1] += high.sum(0)
    elif mode == "reflect":
        out[1 : before + 1] += low[::-1]
        out[len(out) - 1 - after : len(out) - 1] += high[::-1]
    else:
        out[len(out) - before :] += low
        out[:after] += high
    return out
