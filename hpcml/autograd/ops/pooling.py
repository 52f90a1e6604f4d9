"""Pooling and resampling of images: the maximum of windows, and weighted means along dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.autograd.ops.images import (
    Sizes,
    channels_first,
    channels_last,
)
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context, empty
from hpcml.backend import Array, xp


@primitive
def max_pool(
    ctx: Context, x: Array, *,
    sizes: Sizes, kernel: Sizes, stride: Sizes, before: Sizes, dilation: Sizes,
) -> Array:  # fmt: skip
    """The maximum of each window: (N, C, *S) -> (N, C, *sizes); the first gets the gradient."""
    shape = (len(x), *sizes, x.shape[1])
    out, index = empty(shape, x), empty(shape, xp(x).empty(0, np.uint16))
    ctx.attributes = how = kernel, stride, before, dilation
    kernels.images(x).max_pool(channels_last(x), *how, out, index)
    ctx.save(index)
    return channels_first(out)


max_pool.on_device = True


@max_pool.adjoint
def max_pool_x(ctx: Context, g: Array) -> Array:
    (index,) = ctx.saved
    n, channels, *sizes = ctx.shapes[0]
    out = empty((n, *sizes, channels), g)
    kernels.images(g).max_pool_backward(channels_last(g), index, *ctx.attributes, out)
    return ctx.own(channels_first(out))


@dataclass(frozen=True, eq=False)
class Band:
    """A matrix (m, n) of which each row has neighbouring elements only.

    first (m): column of the first; count (m): how many; weights (m, most).
    """

    first: Any
    count: Any
    weights: Any

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Sequence[float]]]) -> Band:
        """Of each row the column of the first element, and the elements."""
        count = np.array([len(row) for _, row in rows], np.int64)
        weights = np.zeros((len(rows), count.max(initial=0)))
        for i, (_, row) in enumerate(rows):
            weights[i, : len(row)] = row
        return cls(np.array([first for first, _ in rows], np.int64), count, weights)

    @functools.lru_cache  # noqa: B019 - bands are few, and kept by who makes them
    def transposed(self, n: int) -> Band:
        """The matrix (n, m). Rows must begin and end in increasing order."""
        last = self.first + self.count
        low = np.searchsorted(last, np.arange(n), "right")
        high = np.searchsorted(self.first, np.arange(n), "right")
        rows = [
            (int(a), [self.weights[j, i - self.first[j]] for j in range(a, b)])
            for i, (a, b) in enumerate(zip(low, high, strict=True))
        ]
        return Band.of(rows)


@primitive
def resample(ctx: Context, x: Array, *, bands: tuple[Band | None, ...]) -> Array:
    """Multiply by a matrix along each spatial dimension: (N, C, *S) -> (N, C, *S').

    Means over windows and linear interpolation are such products. None: leave a dimension.
    """
    ctx.attributes = bands
    return channels_first(_multiplied(channels_last(x), bands))


@resample.adjoint
def resample_x(ctx: Context, g: Array) -> Array:
    sizes = ctx.shapes[0][2:]
    bands = [b and b.transposed(n) for b, n in zip(ctx.attributes, sizes, strict=True)]
    return ctx.own(channels_first(_multiplied(channels_last(g), bands)))


def _multiplied(x: Array, bands: Sequence[Band | None]) -> Array:
    """x (N, *S, C), multiplied along each dimension; a new array."""
    last = x
    for dim, band in enumerate(bands, 1):
        if band is not None:
            before, n, after = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
            made = empty((*x.shape[:dim], len(band.first), *x.shape[dim + 1 :]), x)
            kernels.images(x).resample(
                x.reshape(before, n, after), band.first, band.count,
                band.weights.astype(x.dtype), made.reshape(before, len(band.first), after),
            )  # fmt: skip
            x = made
    return x.copy() if x is last else x
