"""The gradient of the filters: for each of 36 numbers, channels by tiles times tiles by filters."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import tiles
from hpcml.kernels.cpu.images.patches import address, keep
from hpcml.kernels.cpu.images.tiles import BYTES, DEEP
from hpcml.kernels.cpu.images.winograd import maps
from hpcml.kernels.cpu.images.winograd.maps import ALL, OUT
from hpcml.kernels.cpu.images.winograd.products import (
    SPEED,
    count_tiles,
    locate_outputs,
    map_inputs,
    pitch_of,
    spread,
)
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

_TILES = 128
"""Tiles over which is summed at once: they stay in the first-level cache."""


@inline
def _map_gradients(
    g: Any, first: int, count: int, column: int, zeros: int, sources: Any, targets: Any
) -> None:  # fmt: skip
    """A g A^T of some tiles, for the panel of filters that begins at `column`."""
    zero, size = g.dtype.type(0), g.itemsize
    wide, columns = 2 * BYTES // size, g.shape[3]
    down, across = -(-g.shape[1] // OUT), -(-g.shape[2] // OUT)
    start, step = address(g) + column * size, columns * size
    from_, to = address(sources), address(targets)
    for t in range(count):
        locate_outputs(g.shape, first + t, down, across, start, step, zeros, sources)
        few = min(wide, columns - column)
        maps.of_outputs(zero, few, from_, 0, 0, to, t * wide * size)


def _panels(
    g: Any, x: Any, top: int, left: int, many: int, panels: int, sums: Any
) -> tuple[int, int]:
    """Panels of filters, and the work in all."""
    work = count_tiles(g.shape) * ALL * x.shape[3] * g.shape[3] // SPEED
    return sums.shape[2] * x.itemsize // (2 * BYTES), work


@divided("void(R[:, :, :, ::1], R[:, :, :, ::1], int64, int64, int64, int64, T[:, :, ::1])",
         _panels, ranges=1)  # fmt: skip
def sum_tiles(
    g: Any, x: Any, top: int, left: int, many: int, panels: int, sums: Any, low: int, high: int
) -> None:  # fmt: skip
    """sums[tap, c, f] = sum over all outputs of g times what the tap sees: some panels of filters.

    That is G^T [sum over tiles of (A g A^T) * (B^T x B)] G, the adjoint in the filters. top, left,
    many, panels: see `products.multiply_tiles`. The last dimension of sums is whole panels.
    """
    zero, size, run = x.dtype.type(0), x.itemsize, x.shape[3]
    wide, down, across = 2 * BYTES // size, -(-g.shape[1] // OUT), -(-g.shape[2] // OUT)
    in_all, pitch = g.shape[0] * down * across, pitch_of(run, BYTES // size)
    group, line = min(panels, high - low), run * wide * size
    inputs, right = np.empty(ALL * many * pitch, x.dtype), np.zeros(ALL * many * wide, x.dtype)
    product, waste = np.empty(group * ALL * run * wide, x.dtype), np.empty(wide, x.dtype)
    nothing = np.zeros(max(run, g.shape[3]), x.dtype)
    sources, targets = np.empty(ALL, np.int64), np.empty(ALL, np.int64)
    outs, into = np.empty(DEEP, np.int64), address(product)
    zeros, left_, right_ = address(nothing), address(inputs), address(right)
    ready = -1
    for begin in range(low, high, group):
        end = min(begin + group, high)
        product[:] = zero
        for first in range(0, in_all, many):
            count = min(many, in_all - first)
            if first != ready:
                ready = first
                spread(targets, left_, many * pitch * size)
                map_inputs(
                    x, address(x), top, left, down, across, first, count, zeros, sources, targets,
                    pitch,
                )  # fmt: skip
            spread(targets, right_, many * wide * size)
            for panel in range(begin, end):
                _map_gradients(g, first, count, panel * wide, zeros, sources, targets)
                for p in range(ALL):
                    there = into + ((panel - begin) * ALL + p) * line
                    for t in range(0, count, _TILES):
                        some, place = min(_TILES, count - t), p * many + t
                        for c in range(0, run, DEEP):
                            for i in range(DEEP):
                                row = there + (c + i) * wide * size
                                outs[i] = row if c + i < run else address(waste)
                            tiles.columns_of_two(
                                zero, left_ + (place * pitch + c) * size, pitch * size, some,
                                right_ + place * wide * size, address(outs), 0, 0, 0,
                            )  # fmt: skip
        for panel in range(begin, end):
            spread(sources, into + (panel - begin) * ALL * line, line)
            spread(targets, address(sums) + panel * wide * size, run * sums.shape[2] * size)
            for c in range(run):
                maps.to_filters(
                    zero, wide, address(sources), c * wide * size, 0, address(targets),
                    c * sums.shape[2] * size,
                )  # fmt: skip
    keep(inputs), keep(right), keep(product), keep(waste), keep(nothing)
    keep(sources), keep(targets), keep(outs)
