"""Kernels for images: convolution by cuDNN or products of gathered columns, pooling, batch norm.

Images lie channels last, (N, *S, C), with one to three spatial dimensions. Means, scales and sums
of batch normalisation are of the type of sums: float32 beside 16-bit elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcml.backend import Array, xp
from hpcml.kernels.cuda import cudnn
from hpcml.kernels.cuda.columns import (
    column_means,
    column_products,
    column_variances,
    wide_column_sums,
)
from hpcml.kernels.cuda.launch import WARP, aligned, constant, launch, over, share, sum_type
from hpcml.kernels.cuda.products import product

Sizes = tuple[int, ...]

_SOURCE = "images.cu"
_COLUMNS = 256 << 20
"""Bytes of gathered columns at once, unless one sample has more."""

WINDOWS = np.dtype([
    (name, np.int64, 3) for name in ("sizes", "counts", "kernel", "stride", "before", "dilation")
])  # fmt: skip


def _windows(sizes: Sizes, counts: Sizes, kernel: Sizes, stride: Sizes, *more: Sizes) -> Any:
    """The record of a kernel: three dimensions, the first ones of size 1 where there are fewer."""
    every = (sizes, counts, kernel, stride, *more)
    fill = (1, 1, 1, 1, 0, 1)
    rows = [
        (value,) * (3 - len(each)) + tuple(each) for value, each in zip(fill, every, strict=True)
    ]
    return np.array(tuple(rows), WINDOWS)


class _Plan:
    """A convolution as products: which samples at once, and what each group has."""

    def __init__(
        self, image: Array, weight: Sizes, result: Array, stride: Sizes, before: Sizes,
        dilation: Sizes, groups: int,
    ) -> None:  # fmt: skip
        self.filters, self.channels, *kernel = weight
        sizes, counts = image.shape[1:-1], result.shape[1:-1]
        self.taps, self.groups = math.prod(kernel), groups
        self.places, self.count = math.prod(sizes), math.prod(counts)
        self.record = _windows(sizes, counts, tuple(kernel), stride, before, dilation)
        self.samples = len(image)
        # A window that is one place, each of them once: the columns are the image itself.
        self.plain = self.taps == 1 and sizes == counts and {*stride} <= {1} and not any(before)

    def parts(self, itemsize: int) -> Iterator[tuple[int, int, int]]:
        """First sample, number of samples and group of each product."""
        each = max(self.count * self.taps * self.channels * itemsize, 1)
        step = self.samples if self.plain else max(_COLUMNS // each, 1)
        for first in range(0, self.samples, max(step, 1)):
            for group in range(self.groups):
                yield first, min(step, self.samples - first), group

    def rows(self, result: Array, first: int, some: int, group: int) -> Array:
        """Of an array like the result (N, *S', F) what belongs to such a part, as a matrix."""
        each = self.filters // self.groups
        matrix = result.reshape(self.samples * self.count, self.filters)
        part = slice(first * self.count, (first + some) * self.count)
        return matrix[part, group * each : (group + 1) * each]

    def columns(self, image: Array, first: int, some: int, group: int) -> Array:
        """What the taps of all windows see of the image (N, *S, C), of this part."""
        if self.plain:
            matrix = image.reshape(self.samples * self.count, image.shape[-1])
            return matrix[:, group * self.channels : (group + 1) * self.channels]
        made = self.empty(image, some)
        packed = self.packed(image, made)
        over(
            _SOURCE, "gather_columns", image, made.size,
            image[first : first + some], np.int64(some), np.int64(image.shape[-1]),
            np.int64(group * self.channels), np.int64(self.channels), self.record,
            np.bool_(packed), made,
        )  # fmt: skip
        return made

    def empty(self, like: Array, some: int) -> Array:
        """Columns of so many samples."""
        return share((some * self.count, self.taps * self.channels), like, like.dtype)

    def packed(self, image: Array, *others: Array) -> bool:
        """Whether channels can be moved by packs of 16 bytes."""
        pack = 16 // image.dtype.itemsize
        fits = self.channels % pack == 0 and image.shape[-1] % pack == 0
        return fits and aligned(image, *others)

    def by_tap(self, weight: Array) -> Array:
        """Weights (F, C / groups, *K) as a matrix (F, taps * C / groups), in that order."""
        flat = weight.reshape(self.filters, self.channels, self.taps)
        turned = flat if self.taps == 1 else xp(weight).ascontiguousarray(flat.transpose(0, 2, 1))
        return turned.reshape(self.filters, self.taps * self.channels)

    def of_group(self, matrix: Array, group: int) -> Array:
        """The rows of a matrix (F, ...) that are filters of a group."""
        each = self.filters // self.groups
        return matrix[group * each : (group + 1) * each]


def convolve(
    x: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes,
    groups: int, out: Array,
) -> None:  # fmt: skip
    """out[n, p, f] = start + sum over k and c of x[n, p stride - before + k dilation, c] weight."""
    if cudnn.convolve(x, weight, start, stride, before, dilation, out):
        return
    plan = _Plan(x, weight.shape, out, stride, before, dilation, groups)
    weights = plan.by_tap(weight)
    if start.size:
        out[...] = start
    for part in plan.parts(x.dtype.itemsize):
        columns = plan.columns(x, *part)
        mine = plan.of_group(weights, part[2])
        product(columns, mine.T, plan.rows(out, *part), add=bool(start.size))


def convolve_input_gradient(
    g: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes,
    groups: int, out: Array,
) -> None:  # fmt: skip
    """out = start + the adjoint of `convolve` with respect to x, at g."""
    if cudnn.convolve_input_gradient(g, weight, start, stride, before, dilation, out):
        return
    plan = _Plan(out, weight.shape, g, stride, before, dilation, groups)
    weights = plan.by_tap(weight)
    kind = 0 if not start.size else 1 if start.ndim == 1 else 2
    for first, some, group in plan.parts(g.dtype.itemsize):
        columns = plan.empty(g, some)
        product(plan.rows(g, first, some, group), plan.of_group(weights, group), columns)
        target = out[first : first + some]
        before_it = start[first : first + some] if kind == 2 else start
        packed = plan.packed(target, columns, *([before_it] if kind else []))
        over(
            _SOURCE, "collect_columns", out, some * plan.places * plan.channels,
            columns, np.int64(some), np.int64(out.shape[-1]), np.int64(group * plan.channels),
            np.int64(plan.channels), plan.record, before_it, np.int32(kind), np.bool_(packed),
            target,
        )  # fmt: skip


def convolve_weight_gradient(
    g: Array, x: Array, stride: Sizes, before: Sizes, dilation: Sizes, groups: int, out: Array
) -> None:
    """out = the adjoint of `convolve` with respect to the weights: g (N, *S', F), x (N, *S, C)."""
    if cudnn.convolve_weight_gradient(g, x, stride, before, dilation, out):
        return
    plan = _Plan(x, out.shape, g, stride, before, dilation, groups)
    total = xp(out).zeros((plan.filters, plan.taps * plan.channels), sum_type(out))
    for part in plan.parts(g.dtype.itemsize):
        columns = plan.columns(x, *part)
        product(plan.rows(g, *part).T, columns, plan.of_group(total, part[2]), add=True)
    ordered = total.reshape(plan.filters, plan.taps, plan.channels).transpose(0, 2, 1)
    out[...] = ordered.reshape(out.shape)


def max_pool(
    x: Array, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Array, index: Array
) -> None:
    """out = the maximum of each window, index = the number of its tap: the first of equal ones."""
    record = _windows(x.shape[1:-1], out.shape[1:-1], size, stride, before, dilation)
    over(_SOURCE, "max_pool", x, out.size, x, np.int64(len(x)), np.int64(x.shape[-1]), record, out,
         index)  # fmt: skip


def max_pool_backward(
    g: Array, index: Array, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Array
) -> None:
    """out = each gradient added at the place of its window's maximum."""
    record = _windows(out.shape[1:-1], g.shape[1:-1], size, stride, before, dilation)
    over(_SOURCE, "max_pool_backward", g, out.size, g, index, np.int64(len(g)),
         np.int64(g.shape[-1]), record, out)  # fmt: skip


def resample(x: Array, first: Array, count: Array, weights: Array, out: Array) -> None:
    """out[a, j] = sum over k < count[j] of weights[j, k] x[a, first[j] + k]; x (A, n, B).

    first, count, weights: NumPy arrays.
    """
    before, n, after = x.shape
    types = np.int64, np.int64, sum_type(x)
    where = [
        constant(array.astype(dtype), x)
        for array, dtype in zip((first, count, weights), types, strict=True)
    ]
    sizes = [np.int64(size) for size in (before, n, out.shape[1], after, weights.shape[1])]
    over(_SOURCE, "resample", x, out.size, x, *where, *sizes, out)


def transpose(x: Array, out: Array) -> None:
    """out[n, j, i] = x[n, i, j]."""
    count, rows, columns = x.shape
    tiles = -(-columns // WARP) * -(-rows // WARP) * count
    launch(_SOURCE, "transpose", x, (tiles,), (WARP, 8), x, np.int64(rows), np.int64(columns), out)


def batch_moments(x: Array, mean: Array, variance: Array) -> None:
    """Mean and variance of each column of x (M, C), M at least 1."""
    column_means(x, mean)
    column_variances(x, mean, variance)


def batch_norm_sums(g: Array, x: Array, mean: Array, sums: Array) -> None:
    """sums = the column sums of g and of g (x - mean)."""
    wide_column_sums(g, sums[0])
    column_products(g, x, mean, sums[1])


def _by_column(name: str, arrays: tuple[Array, ...], *args: Any) -> None:
    """Start a kernel over the elements of a matrix, of which all `arrays` have the shape."""
    x = arrays[-1]
    packed = x.shape[1] * x.dtype.itemsize % 16 == 0 and aligned(*arrays)
    over(
        _SOURCE, name, x, x.size, *args, np.int64(x.size), np.int64(x.shape[1]), np.bool_(packed),
        x,
    )  # fmt: skip


def batch_norm(x: Array, mean: Array, scale: Array, shift: Array, out: Array) -> None:
    """out = (x - mean) scale + shift, by column."""
    _by_column("batch_norm", (x, out), x, mean, scale, shift)


def batch_norm_backward(
    g: Array, x: Array, mean: Array, scale: Array, slopes: Array, pending: Array, out: Array
) -> None:
    """out = pending (or nothing) + scale (g - slopes[0] - slopes[1] (x - mean)), by column."""
    more = pending.shape[0] > 0
    _by_column(
        "batch_norm_backward", (g, x, *((pending,) if more else ()), out),
        g, x, mean, scale, slopes, pending, np.bool_(more),
    )  # fmt: skip
