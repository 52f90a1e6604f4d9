"""Forward and the gradient of the input: tiles by channels times channels by filters, 36 times."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import tiles
from hpcml.kernels.cpu.images.order import pack_channels, pack_filters
from hpcml.kernels.cpu.images.patches import address, keep
from hpcml.kernels.cpu.images.tiles import BYTES, DEEP, HIGH
from hpcml.kernels.cpu.images.winograd import maps
from hpcml.kernels.cpu.images.winograd.maps import ALL, IN, OUT, TAPS
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

SPEED = 32
"""Multiplications and additions in the time of one of `team`'s units of work."""


def count_tiles(shape: Any) -> int:
    """Tiles of outputs (N, H, W, F)."""
    return int(shape[0] * -(-shape[1] // OUT) * -(-shape[2] // OUT))


@inline
def pitch_of(channels: int, lanes: int) -> Any:
    """Numbers from a tile to the next; `tiles.columns_of_two` reads beyond the last channel."""
    return (channels + DEEP + lanes - 1) // lanes * lanes


@inline
def spread(table: Any, start: int, step: int) -> None:
    """Fill a table with addresses that are `step` apart."""
    for i in range(table.size):
        table[i] = start + i * step


@inline
def map_inputs(
    x: Any, base: int, top: int, left: int, down: int, across: int, first: int, count: int,
    zeros: int, sources: Any, targets: Any, pitch: int,
) -> None:  # fmt: skip
    """B^T x B of some tiles, of `down` times `across` an image, which begin beyond its edge.

    targets: where the 36 numbers of the first channel of the first tile go; then every `pitch`.
    """
    zero, size, (_, height, width, channels) = x.dtype.type(0), x.itemsize, x.shape
    from_, to = address(sources), address(targets)
    for t in range(count):
        column, rest = (first + t) % across * OUT - left, (first + t) // across
        row, n = rest % down * OUT - top, rest // down
        for i in range(ALL):
            h, w = row + i // IN, column + i % IN
            place = base + ((n * height + h) * width + w) * channels * size
            sources[i] = place if 0 <= h < height and 0 <= w < width else zeros
        maps.of_inputs(zero, channels, from_, 0, 0, to, t * pitch * size)


@inline
def locate_outputs(
    shape: Any, tile: int, down: int, across: int, base: int, step: int, outside: int, places: Any
) -> None:  # fmt: skip
    """Where the outputs of a tile lie, `step` bytes for each; those there are not: `outside`."""
    column, rest = tile % across * OUT, tile // across
    row, n = rest % down * OUT, rest // down
    for i in range(OUT * OUT):
        h, w = row + i // OUT, column + i % OUT
        inside = h < shape[1] and w < shape[2]
        places[i] = base + ((n * shape[1] + h) * shape[2] + w) * step if inside else outside


@inline
def _map_filters(
    weight: Any, taps: Any, turned: bool, run: int, first: int, last: int, packed: Any,
    sources: Any, targets: Any, panel: int,
) -> None:  # fmt: skip
    """G w G^T of some filters, or of the filters' channels, panel after panel."""
    zero, size = weight.dtype.type(0), weight.itemsize
    wide = 2 * BYTES // size
    line = run * wide * size
    spread(sources, address(packed), line)
    for column in range(first, last, wide):
        few = min(wide, last - column)
        if turned:
            pack_channels(weight, 0, run, column, few, wide, taps, packed)
        else:
            pack_filters(weight, column, few, wide, packed)
        spread(targets, panel, line)
        maps.of_filters(zero, run * wide, address(sources), 0, 0, address(targets), 0)
        panel += ALL * line


def _blocks(
    x: Any, weight: Any, start: Any, taps: Any, top: int, left: int, turned: bool, many: int,
    panels: int, out: Any,
) -> tuple[int, int]:  # fmt: skip
    """Blocks of tiles times blocks of filters, and the work in all."""
    count, columns = count_tiles(out.shape), panels * 2 * BYTES // x.itemsize
    work = count * ALL * x.shape[3] * out.shape[3] // SPEED
    return -(-count // many) * -(-out.shape[3] // columns), work


@divided("void(R[:, :, :, ::1], R[:, :, ::1], R[:, ::1], I[:, ::1], int64, int64, boolean, int64,"
         " int64, T[:, :, :, ::1])", _blocks, ranges=1)  # fmt: skip
def multiply_tiles(
    x: Any, weight: Any, start: Any, taps: Any, top: int, left: int, turned: bool, many: int,
    panels: int, out: Any, low: int, high: int,
) -> None:  # fmt: skip
    """out = start + the sums of tiles that begin `top` rows and `left` columns before the images.

    start, turned: see `convolution.sum_taps`. many tiles and so many panels of filters are worked
    on at once.
    """
    zero, size, run, columns = x.dtype.type(0), x.itemsize, x.shape[3], out.shape[3]
    wide, down, across = 2 * BYTES // size, -(-out.shape[1] // OUT), -(-out.shape[2] // OUT)
    in_all, held = out.shape[0] * down * across, -(-many // HIGH) * HIGH
    blocks, block_size, pitch = -(-in_all // many), panels * wide, pitch_of(run, BYTES // size)
    inputs, right = (
        np.empty(ALL * held * pitch, x.dtype),
        np.empty(panels * ALL * run * wide, x.dtype),
    )
    packed, product = np.empty(TAPS**2 * run * wide, x.dtype), np.empty(ALL * held * wide, x.dtype)
    nothing, waste = np.zeros(max(run, columns), x.dtype), np.empty(max(columns, wide), x.dtype)
    sources, mapped = np.empty(ALL, np.int64), np.empty(ALL, np.int64)
    lefts, sums = np.empty(ALL * held, np.int64), np.empty(ALL * held, np.int64)
    none, begins = np.empty(HIGH, np.int64), np.empty(OUT * OUT, np.int64)
    outs, targets = np.empty(OUT * OUT, np.int64), np.empty(ALL, np.int64)
    base, matrix, zeros, unwanted = address(x), address(right), address(nothing), address(waste)
    lines, places, to, from_ = address(lefts), address(sums), address(out), address(start)
    each = columns * size if start.shape[0] > 1 else 0
    spread(lefts, address(inputs), pitch * size), spread(sums, address(product), wide * size)
    spread(none, zeros, 0), spread(begins, zeros, 0)
    spread(mapped, address(product), held * wide * size)
    ready = packed_for = -1
    for item in range(low, high):
        part, block = item // blocks, item % blocks
        first, begin = block * many, part * block_size
        count, last = min(many, in_all - first), min(begin + block_size, columns)
        if part != packed_for:
            packed_for = part
            _map_filters(
                weight, taps, turned, run, begin, last, packed, sources[: TAPS**2], targets, matrix
            )
        if block != ready:
            ready = block
            spread(targets, address(inputs), held * pitch * size)
            map_inputs(
                x, base, top, left, down, across, first, count, zeros, sources, targets, pitch
            )
        for column in range(begin, last, wide):
            panel = matrix + (column - begin) * ALL * run * size
            for p in range(ALL):
                for t in range(p * held, p * held + count, HIGH):
                    tiles.rows_of_two(
                        zero, lines + t * 8, HIGH * pitch * size, 1, run,
                        panel + p * run * wide * size, address(none), places + t * 8, 0,
                    )  # fmt: skip
            for t in range(count):
                locate_outputs(
                    out.shape, first + t, down, across, to, columns * size, unwanted, outs
                )
                if start.shape[0] > 0:
                    locate_outputs(out.shape, first + t, down, across, from_, each, zeros, begins)
                maps.to_outputs(
                    zero, min(wide, last - column), address(mapped), t * wide * size,
                    address(begins), address(outs), column * size,
                )  # fmt: skip
    keep(inputs), keep(right), keep(packed), keep(product), keep(nothing), keep(waste)
    keep(sources), keep(mapped), keep(lefts), keep(sums), keep(none), keep(begins)
    keep(outs), keep(targets)
