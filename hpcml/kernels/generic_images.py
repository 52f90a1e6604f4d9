"""Kernels for images as array expressions, the counterparts of those of `cpu`; see `generic`.

Images are (N, *S, C): channels last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hpcml.backend import Array, xp

Sizes = tuple[int, ...]


def transpose(x: Array, out: Array) -> None:
    """out[n, j, i] = x[n, i, j]."""
    out[...] = x.swapaxes(1, 2)


def _reach(n: int, k: int, stride: int, before: int, dilation: int, count: int) -> int:
    """Elements of a dimension of size n with the padding that `count` outputs reach."""
    return max(count * stride + (k - 1) * dilation, before + n)


def _padded(x: Array, size: Sizes, *how: Any, value: float = 0.0) -> Array:
    """A copy of x amid `value`; how: stride, before, dilation, and the number of outputs."""
    spaces = x.shape[1:-1]
    reach = [_reach(*each) for each in zip(spaces, size, *how, strict=True)]
    padded = xp(x).full((x.shape[0], *reach, x.shape[-1]), value, x.dtype)
    _inside(padded, spaces, how[1])[...] = x
    return padded


def _inside(padded: Array, spaces: Sizes, before: Sizes) -> Array:
    """Where x lies in what is padded."""
    within = tuple(slice(b, b + n) for b, n in zip(before, spaces, strict=True))
    return padded[(slice(None), *within)]


def _taps(
    padded: Array, size: Sizes, stride: Sizes, dilation: Sizes, count: Sizes
) -> Iterator[tuple[Sizes, Array]]:
    """For each tap of a window what all outputs see there, a view (N, *S', C)."""
    for at in itertools.product(*map(range, size)):
        along = zip(at, stride, dilation, count, strict=True)
        index = (slice(i * d, i * d + n * s, s) for i, s, d, n in along)
        yield at, padded[(slice(None), *index)]


def _groups(channels: int, filters: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """The channels and the filters of each group."""
    c, f = channels // groups, filters // groups
    for g in range(groups):
        yield slice(g * c, (g + 1) * c), slice(g * f, (g + 1) * f)


def convolve(
    x: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes,
    groups: int, out: Array,
) -> None:  # fmt: skip
    """out[n, p, f] = start + sum over k and c of x[n, p stride - before + k dilation, c] weight.

    weight (F, C / groups, *K); start: what the sums begin with: (F), or like out, or empty for 0.
    """
    size, count = weight.shape[2:], out.shape[1:-1]
    padded = _padded(x, size, stride, before, dilation, count)
    out[...] = start if start.size else 0
    for at, seen in _taps(padded, size, stride, dilation, count):
        for c, f in _groups(x.shape[-1], out.shape[-1], groups):
            out[..., f] += seen[..., c] @ weight[(f, slice(None), *at)].T


def convolve_input_gradient(
    g: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes,
    groups: int, out: Array,
) -> None:  # fmt: skip
    """out = start + the adjoint of `convolve` with respect to x, at g."""
    size, count = weight.shape[2:], g.shape[1:-1]
    padded = _padded(xp(g).zeros_like(out), size, stride, before, dilation, count)
    for at, seen in _taps(padded, size, stride, dilation, count):
        for c, f in _groups(out.shape[-1], g.shape[-1], groups):
            seen[..., c] += g[..., f] @ weight[(f, slice(None), *at)]
    out[...] = _inside(padded, out.shape[1:-1], before) + (start if start.size else 0)


def convolve_weight_gradient(
    g: Array, x: Array, stride: Sizes, before: Sizes, dilation: Sizes, groups: int, out: Array
) -> None:
    """out = the adjoint of `convolve` with respect to the weights: g (N, *S', F), x (N, *S, C)."""
    size, count = out.shape[2:], g.shape[1:-1]
    padded = _padded(x, size, stride, before, dilation, count)
    for at, seen in _taps(padded, size, stride, dilation, count):
        for c, f in _groups(x.shape[-1], g.shape[-1], groups):
            product = xp(g).tensordot(g[..., f], seen[..., c], (range(g.ndim - 1),) * 2)
            out[(f, slice(None), *at)] = product


def max_pool(
    x: Array, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Array, index: Array
) -> None:
    """out = the maximum of each window, index = the number of its tap: the first of equal ones.

    The last NaN counts as the largest. Padding is minus infinity.
    """
    m, count = xp(x), out.shape[1:-1]
    padded = _padded(x, size, stride, before, dilation, count, value=-m.inf)
    real = _padded(m.ones_like(x, dtype=bool), size, stride, before, dilation, count)
    pairs = zip(
        _taps(padded, size, stride, dilation, count), _taps(real, size, stride, dilation, count),
        strict=True,
    )  # fmt: skip
    found = m.zeros(out.shape, bool)
    out[...], index[...] = -m.inf, 0
    for number, ((_, seen), (_, there)) in enumerate(pairs):
        better = there & (~found | (seen > out) | m.isnan(seen))
        out[...], index[...] = m.where(better, seen, out), m.where(better, number, index)
        found |= there


def max_pool_backward(
    g: Array, index: Array, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Array
) -> None:
    """out = each gradient added at the place of its window's maximum."""
    count = g.shape[1:-1]
    padded = _padded(xp(g).zeros_like(out), size, stride, before, dilation, count)
    for number, (_, seen) in enumerate(_taps(padded, size, stride, dilation, count)):
        seen += xp(g).where(index == number, g, 0)
    out[...] = _inside(padded, out.shape[1:-1], before)


def resample(x: Array, first: Array, count: Array, weights: Array, out: Array) -> None:
    """out[a, j] = sum over k < count[j] of weights[j, k] x[a, first[j] + k]; x (A, n, B)."""
    for j in range(out.shape[1]):
        low, n = int(first[j]), int(count[j])
        out[:, j] = xp(x).tensordot(weights[j, :n], x[:, low : low + n], (0, 1))


def batch_moments(x: Array, mean: Array, variance: Array) -> None:
    """Mean and variance of each column of x (M, C)."""
    mean[...], variance[...] = x.mean(0), x.var(0)


def batch_norm(x: Array, mean: Array, scale: Array, shift: Array, out: Array) -> None:
    """out = (x - mean) scale + shift, by column."""
    out[...] = (x - mean) * scale + shift


def batch_norm_sums(g: Array, x: Array, mean: Array, sums: Array) -> None:
    """sums = the column sums of g and of g (x - mean)."""
    sums[0], sums[1] = g.sum(0), (g * (x - mean)).sum(0)


def batch_norm_backward(
    g: Array, x: Array, mean: Array, scale: Array, slopes: Array, pending: Array, out: Array
) -> None:
    """out = pending (or nothing) + scale (g - slopes[0] - slopes[1] (x - mean)), by column."""
    result = scale * (g - slopes[0] - slopes[1] * (x - mean))
    out[...] = result + pending if pending.shape[0] else result
