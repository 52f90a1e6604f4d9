"""Convolutions of 3 x 3 with stride 1 by a quarter of the multiplications (Winograd's method).

Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1; the maps and
their notation are in `maps`. Images are cut into tiles; each of the 36 numbers that a tile becomes
in each channel takes part in a product of matrices of its own, tiles by channels times channels by
filters. All of that is done for some tiles and some filters at a time, which stay in the cache. A
number of the result depends on its own tile only, so its bits do not depend on how many images
there are, nor on the number of threads; but they do on where the first tile begins.

The functions are those of `filters`, which do what does not fit: other sizes, strides, groups, and
images so small or of so few channels that nothing is gained.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu import jit
from hpcml.kernels.cpu.images import filters
from hpcml.kernels.cpu.images.order import order_sums
from hpcml.kernels.cpu.images.tiles import BYTES, HIGH
from hpcml.kernels.cpu.images.winograd.maps import ALL, TAPS
from hpcml.kernels.cpu.images.winograd.products import count_tiles, multiply_tiles
from hpcml.kernels.cpu.images.winograd.sums import sum_tiles

__all__ = ["convolve", "convolve_input_gradient", "convolve_weight_gradient", "fits", "load"]

Sizes = tuple[int, ...]

_BUFFER = 1 << 20
"""Bytes of mapped inputs that are made at once: they stay in the second-level cache."""
_FEW = 16
"""Channels or filters below which the maps cost more than they spare."""

_PLAIN = np.array([[0, 0, 0, tap] for tap in range(TAPS * TAPS)], np.int64)
_TURNED = np.ascontiguousarray(_PLAIN[::-1])
"""The table of taps as `order.pack_channels` takes it: as they are, and turned by 180 degrees."""


def load(dtype: str) -> None:
    """Make these kernels ready too, for "float32" or "float64", after those for images."""
    jit.load(dtype)


def convolve(
    x: Any, weight: Any, start: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int,
    out: Any,
) -> None:  # fmt: skip
    """See `filters.convolve`."""
    if fits(weight.shape, stride, dilation, groups, out.shape[1:-1]):
        _multiply(x, weight, start, before, False, out)
    else:
        filters.convolve(x, weight, start, stride, before, dilation, groups, out)


def convolve_input_gradient(
    g: Any, weight: Any, start: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int,
    out: Any,
) -> None:  # fmt: skip
    """See `filters.convolve_input_gradient`: with stride 1 a convolution by the turned filter."""
    if fits(weight.shape, stride, dilation, groups, out.shape[1:-1]):
        _multiply(g, weight, start, tuple(TAPS - 1 - b for b in before), True, out)
    else:
        filters.convolve_input_gradient(g, weight, start, stride, before, dilation, groups, out)


def convolve_weight_gradient(
    g: Any, x: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int, out: Any
) -> None:
    """See `filters.convolve_weight_gradient`."""
    if not fits(out.shape, stride, dilation, groups, g.shape[1:-1]):
        filters.convolve_weight_gradient(g, x, stride, before, dilation, groups, out)
        return
    count, run = out.shape[:2]
    wide = 2 * BYTES // x.itemsize
    sums = np.empty((TAPS * TAPS, run, -(-count // wide) * wide), x.dtype)
    sum_tiles(g, x, *before, *_blocks(x, g), sums)
    order_sums(sums.reshape(1, TAPS * TAPS * run, -1), out.reshape(count, run, TAPS * TAPS))


def fits(weight: Sizes, stride: Sizes, dilation: Sizes, groups: int, outputs: Sizes) -> bool:
    """Whether a convolution with weights of this shape is one that this method computes, faster."""
    ones = (1, 1)
    return (
        weight[2:] == (TAPS, TAPS) and stride == dilation == ones and groups == 1
        and min(weight[:2]) >= _FEW and min(outputs) >= TAPS
    )  # fmt: skip


def _multiply(x: Any, weight: Any, start: Any, before: Sizes, turned: bool, out: Any) -> None:
    multiply_tiles(
        x, weight.reshape(*weight.shape[:2], TAPS * TAPS), start.reshape(-1, out.shape[-1]),
        _TURNED if turned else _PLAIN, *before, turned, *_blocks(x, out), out,
    )  # fmt: skip


def _blocks(x: Any, out: Any) -> tuple[int, int]:
    """How many tiles, and how many panels of filters, are worked on at once.

    Of what there is less, tiles or filters, all are mapped once and kept, the others in blocks.
    """
    tiles, wide = count_tiles(out.shape), 2 * BYTES // x.itemsize
    if tiles <= out.shape[-1]:
        return max(tiles, 1), 1
    row = ALL * x.shape[-1] * x.itemsize * HIGH
    return min(max(_BUFFER // row, 2) * HIGH, tiles), -(-out.shape[-1] // wide)
