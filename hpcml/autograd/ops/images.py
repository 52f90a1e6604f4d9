"""Convolutions of images, and what they share with other operations on them.

Images are (N, C, *S) as everywhere, but results lie in memory channels last, as their kernels take
them: between layers that keep the order of what they get nothing is moved.
"""

from __future__ import annotations

import math

import numpy as np

from hpcml import kernels
from hpcml.autograd.ops.arrays import contiguous, same_type
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context, empty
from hpcml.backend import Array

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]
"""Before and after, along each dimension."""


def channels_last(x: Array) -> Array:
    """(N, C, *S) as a contiguous array (N, *S, C): a view if its elements lie so, else a copy."""
    moved = x.transpose(0, *range(2, x.ndim), 1)
    if moved.flags.c_contiguous or not x.flags.c_contiguous or type(x) is not np.ndarray:
        return contiguous(moved)
    made = empty(moved.shape, x)
    places = math.prod(x.shape[2:])
    kernels.images(x).transpose(
        contiguous(x).reshape(*x.shape[:2], places), made.reshape(len(x), places, x.shape[1])
    )
    return made


def channels_first(x: Array) -> Array:
    """(N, *S, C) as (N, C, *S), a view."""
    return x.transpose(0, x.ndim - 1, *range(1, x.ndim - 1))


def _gradient(ctx: Context, g: Array) -> Array:
    """The gradient of the output channels last, for all adjoints."""
    last: Array = ctx.shared(lambda: channels_last(g))
    return last


def _start(ctx: Context, shape: Sizes, like: Array) -> Array:
    """What a gradient (N, C, *S) has got so far, channels last; empty for nothing."""
    pending = ctx.take_pending()
    return empty((0,), like) if pending is None else channels_last(pending)


def out_sizes(sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Pairs, dilation: Sizes) -> Sizes:
    """How many windows fit along each dimension."""
    every = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return tuple((n + a + b - (k - 1) * d - 1) // s + 1 for n, k, s, (a, b), d in every)


@primitive
def convolution(
    ctx: Context, x: Array, weight: Array, bias: Array | None, *,
    stride: Sizes, padding: Pairs, dilation: Sizes, groups: int, winograd: bool = False,
) -> Array:  # fmt: skip
    """Cross-correlation: x (N, C, *S), weight (F, C / groups, *K), bias (F) or None -> (N, F, *S').

    Each group of channels has its own F / groups filters. winograd: see `kernels.convolutions`.
    """
    same_type(ctx, "x", "weight", "bias")
    how = stride, tuple(before for before, _ in padding), dilation, groups
    ctx.attributes = how, winograd
    ctx.save(x if ctx.needs[1] else None, weight if ctx.needs[0] else None)
    sizes = out_sizes(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    out = empty((len(x), *sizes, len(weight)), x)
    start = empty((0,), x) if bias is None else contiguous(bias)
    kernel = kernels.convolutions(x, winograd)
    kernel.convolve(channels_last(x), contiguous(weight), start, *how, out)
    return channels_first(out)


convolution.on_device = True


@convolution.adjoint
def convolution_x(ctx: Context, g: Array) -> Array:
    _, weight = ctx.saved
    n, channels, *sizes = ctx.shapes[0]
    start, out = _start(ctx, ctx.shapes[0], g), empty((n, *sizes, channels), g)
    how, winograd = ctx.attributes
    kernels.convolutions(g, winograd).convolve_input_gradient(
        _gradient(ctx, g), contiguous(weight), start, *how, out
    )
    return ctx.own(channels_first(out))


@convolution.adjoint
def convolution_weight(ctx: Context, g: Array) -> Array:
    x, _ = ctx.saved
    out = ctx.empty(ctx.shapes[1], g)
    how, winograd = ctx.attributes
    kernels.convolutions(g, winograd).convolve_weight_gradient(
        _gradient(ctx, g), channels_last(x), *how, out
    )
    return out


@convolution.adjoint
def convolution_bias(ctx: Context, g: Array) -> Array:
    return _channel_sums(ctx, g)


def _channel_sums(ctx: Context, g: Array) -> Array:
    out = ctx.empty(ctx.shapes[2], g)
    last = _gradient(ctx, g)
    kernels.of(g).column_sums(last.reshape(math.prod(last.shape[:-1]), last.shape[-1]), out)
    return out


@primitive
def transposed_convolution(
    ctx: Context, x: Array, weight: Array, bias: Array | None, *,
    sizes: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, groups: int,
) -> Array:  # fmt: skip
    """The adjoint of a convolution, as a layer: x (N, C, *S), weight (C, F / groups, *K).

    Gives (N, F, *sizes): images of which `convolution` with these options makes some like x.
    """
    same_type(ctx, "x", "weight", "bias")
    ctx.attributes = how = stride, before, dilation, groups
    ctx.save(x if ctx.needs[1] else None, weight if ctx.needs[0] else None)
    out = empty((len(x), *sizes, weight.shape[1] * groups), x)
    start = empty((0,), x) if bias is None else contiguous(bias)
    kernels.images(x).convolve_input_gradient(
        channels_last(x), contiguous(weight), start, *how, out
    )
    return channels_first(out)


@transposed_convolution.adjoint
def transposed_convolution_x(ctx: Context, g: Array) -> Array:
    _, weight = ctx.saved
    n, channels, *sizes = ctx.shapes[0]
    start, out = _start(ctx, ctx.shapes[0], g), empty((n, *sizes, channels), g)
    kernels.images(g).convolve(_gradient(ctx, g), contiguous(weight), start, *ctx.attributes, out)
    return ctx.own(channels_first(out))


@transposed_convolution.adjoint
def transposed_convolution_weight(ctx: Context, g: Array) -> Array:
    x, _ = ctx.saved
    out = ctx.empty(ctx.shapes[1], g)
    kernels.images(g).convolve_weight_gradient(
        channels_last(x), _gradient(ctx, g), *ctx.attributes, out
    )
    return out


@transposed_convolution.adjoint
def transposed_convolution_bias(ctx: Context, g: Array) -> Array:
    return _channel_sums(ctx, g)
