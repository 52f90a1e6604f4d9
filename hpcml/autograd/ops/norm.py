"""Normalisation: of channels over a batch, and of the elements of each row."""

from __future__ import annotations

from typing import Any, Protocol

from hpcml import kernels
from hpcml.autograd.ops.arrays import contiguous, floats, same_type
from hpcml.autograd.ops.images import channels_first, channels_last
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context, empty, sum_type
from hpcml.backend import Array, xp


class Across(Protocol):
    """How statistics of parts, such as ranks have, become those of the whole."""

    def moments(self, count: int, mean: Array, variance: Array) -> int:
        """Make mean and variance (C) of `count` elements those of all; how many these are."""

    def total(self, sums: Array) -> Array:
        """The sum over all parts."""


def _rows(x: Array) -> Array:
    """(N, C, *S) as a matrix with a column for each channel."""
    last = channels_last(x)
    return last.reshape(x.size // max(x.shape[1], 1), x.shape[1])


@primitive
def batch_norm(
    ctx: Context, x: Array, weight: Array | None, bias: Array | None, *,
    running: tuple[Array, Array] | None, training: bool, momentum: float, eps: float,
    across: Across | None = None,
) -> Array:  # fmt: skip
    """Normalise each channel of x (N, C, *S), then scale and shift it: weight, bias (C) or None.

    Ioffe and Szegedy 2015. running: estimates of mean and variance (C), or None. In training the
    statistics are those of x, and the estimates, if any, go from r to (1 - momentum) r + momentum *
    statistic, of variances the unbiased one; otherwise the estimates are the statistics. across: x
    is a part of what they are taken of; gradients of weight and bias are then of that part.
    """
    same_type(ctx, "x", "weight", "bias")
    rows = _rows(x)
    count, channels = rows.shape
    k, m, kind = kernels.images(x), xp(x), sum_type(x)
    if training:
        mean, variance = m.zeros((2, channels), kind)
        if count:
            k.batch_moments(rows, mean, variance)
        if across is not None:
            count = across.moments(count, mean, variance)
        if running is not None and count:
            unbiased = variance * (count / max(count - 1, 1))
            for estimate, found in zip(running, (mean, unbiased), strict=True):
                estimate *= 1 - momentum
                estimate += momentum * found
    else:
        assert running is not None
        mean, variance = (estimate.astype(kind) for estimate in running)
    inverse = (1 / m.sqrt(variance + eps)).astype(kind)
    scale = inverse if weight is None else inverse * weight.astype(kind, copy=False)
    shift = m.zeros(channels, kind)
    if bias is not None:
        shift = contiguous(bias.astype(kind, copy=False))
    last = channels_last(x)
    out = empty(last.shape, x)
    k.batch_norm(rows, mean, scale, shift, out.reshape(rows.shape))
    ctx.attributes = mean, inverse, training, count, across
    ctx.save(x, weight)
    return channels_first(out)


batch_norm.on_device = True


def _sums(ctx: Context, g: Array) -> Any:
    """The rows of g and of x, and the sums over columns of g and of g (x - mean)."""

    def compute() -> tuple[Array, Array, Array]:
        x, _ = ctx.saved
        mean = ctx.attributes[0]
        sums = xp(g).zeros((2, x.shape[1]), sum_type(g))
        pair = _rows(g), _rows(x)
        if x.size:
            kernels.images(g).batch_norm_sums(*pair, mean, sums)
        return *pair, sums

    return ctx.shared(compute)


@batch_norm.adjoint
def batch_norm_x(ctx: Context, g: Array) -> Array:
    x, weight = ctx.saved
    mean, inverse, training, count, across = ctx.attributes
    g_rows, x_rows, sums = _sums(ctx, g)
    slopes = xp(g).zeros_like(sums)
    if training and count:
        total = sums if across is None else across.total(sums)
        slopes[0] = total[0] / count
        slopes[1] = total[1] * inverse**2 / count
    pending = ctx.take_pending()
    before = g_rows[:0] if pending is None else _rows(pending)
    scale = inverse if weight is None else inverse * weight.astype(inverse.dtype, copy=False)
    n, channels, *sizes = x.shape
    out = empty((n, *sizes, channels), g)
    kernels.images(g).batch_norm_backward(
        g_rows, x_rows, mean, scale, slopes, before, out.reshape(x_rows.shape)
    )
    return ctx.own(channels_first(out))


@batch_norm.adjoint
def batch_norm_weight(ctx: Context, g: Array) -> Array:
    inverse = ctx.attributes[1]
    _, _, sums = _sums(ctx, g)
    return xp(g).multiply(sums[1], inverse, out=ctx.empty(ctx.shapes[1], sums))


@batch_norm.adjoint
def batch_norm_bias(ctx: Context, g: Array) -> Array:
    _, _, sums = _sums(ctx, g)
    out = ctx.empty(ctx.shapes[2], sums)
    out[...] = sums[0]
    return out


@primitive
def layer_norm(
    ctx: Context, x: Array, weight: Array | None, bias: Array | None, *, size: int, eps: float
) -> Array:
    """Normalise the last dimensions, `size` elements together, then scale and shift by element.

    Ba, Kiros, Hinton 2016. x (..., size), weight, bias of `size` elements or None.
    """
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.size != size:
            raise ValueError(f"{name} {array.shape} must have {size} elements")
    same_type(ctx, "x", "weight", "bias")
    x = floats(x)
    rows = x.size // size if size else 0
    mean, inverse = empty((2, rows), x, sum_type(x))
    ctx.attributes = rows, size, mean, inverse, mean.dtype.type(eps)
    ctx.save(x, weight, bias)
    return _layer_norm(ctx, x, weight, bias)


def _layer_norm(ctx: Context, x: Array, weight: Array | None, bias: Array | None) -> Array:
    rows, size, mean, inverse, eps = ctx.attributes
    none = x.reshape(-1)[:0]
    out = ctx.empty(x.shape, x)
    kernels.of(x).layer_norm(
        x.reshape(rows, size), none if weight is None else contiguous(weight).reshape(-1),
        none if bias is None else contiguous(bias).reshape(-1), eps,
        out.reshape(rows, size), mean, inverse,
    )  # fmt: skip
    return out


@layer_norm.remade
def layer_norm_again(ctx: Context) -> Array:
    return _layer_norm(ctx, *ctx.saved)


layer_norm.on_device = True


@layer_norm.adjoint
def layer_norm_x(ctx: Context, g: Array) -> Array:
    x, weight, _ = ctx.saved
    rows, size, mean, inverse, _ = ctx.attributes
    pending = ctx.take_pending()
    none = x.reshape(rows, size)[:0]
    out = ctx.empty(x.shape, x)
    kernels.of(x).layer_norm_backward(
        contiguous(g).reshape(rows, size), x.reshape(rows, size),
        none.reshape(-1) if weight is None else contiguous(weight).reshape(-1), mean, inverse,
        none if pending is None else contiguous(pending).reshape(rows, size),
        out.reshape(rows, size),
    )  # fmt: skip
    return out


@layer_norm.adjoint
def layer_norm_weight(ctx: Context, g: Array) -> Array:
    x, weight, _ = ctx.saved
    rows, size, mean, inverse, _ = ctx.attributes
    out = ctx.empty(weight.shape, x)
    kernels.of(x).layer_norm_weight_gradient(
        contiguous(g).reshape(rows, size), x.reshape(rows, size), mean, inverse, out.reshape(-1)
    )
    return out


@layer_norm.adjoint
def layer_norm_bias(ctx: Context, g: Array) -> Array:
    rows, size, *_ = ctx.attributes
    out = ctx.empty(ctx.shapes[2], g)
    kernels.of(g).column_sums(contiguous(g).reshape(rows, size), out.reshape(-1))
    return out
