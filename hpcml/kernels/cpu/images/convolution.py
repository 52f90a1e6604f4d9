"""The products that convolutions are made of, without an array of columns.

Forward and the gradient of the input are products whose left rows are looked up: a table has the
address of the channels for each tap of the filter and each output of a tile, or that of zeros
beyond the edge (Dukhan 2019, "The Indirect Convolution Algorithm"). So stride, padding, dilation,
and one to three dimensions need no code of their own. The gradient of the weights multiplies the
same rows, transposed, by the gradient of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import tiles
from hpcml.kernels.cpu.images.order import pack_channels, pack_filters
from hpcml.kernels.cpu.images.patches import (
    COUNT,
    OUT,
    STEP,
    address,
    copy_patch,
    keep,
    locate,
    look_up,
    shift,
)
from hpcml.kernels.cpu.images.tiles import BYTES, DEEP, HIGH
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

_SPEED = 32
"""Multiplications and additions in the time of one of `team`'s units of work."""
_ROWS = 128
"""Outputs over which the gradient of weights sums at once."""
_SUMS = 3 << 18
"""Bytes of such sums that are worked on at once: they stay in the second-level cache."""


def _blocks(
    x: Any, weight: Any, start: Any, taps: Any, spans: Any, steps: Any, groups: int, turned: bool,
    copied: bool, block: int, out: Any,
) -> tuple[int, int]:  # fmt: skip
    """Tiles of outputs times blocks of columns, and the work in all."""
    rows, columns = x.shape[0] * int(steps[COUNT].prod()), out.shape[4] // groups
    work = rows * (taps.shape[0] * (x.shape[4] // groups) + 1) * out.shape[4]
    return -(-rows // HIGH) * groups * -(-columns // block), work // _SPEED


@divided("void(R[:, :, :, :, ::1], R[:, :, ::1], R[:, ::1], I[:, ::1], I[:, ::1], I[:, ::1], int64,"
         " boolean, boolean, int64, T[:, :, :, :, ::1])", _blocks, ranges=1)  # fmt: skip
def sum_taps(
    x: Any, weight: Any, start: Any, taps: Any, spans: Any, steps: Any, groups: int, turned: bool,
    copied: bool, block: int, out: Any, low: int, high: int,
) -> None:  # fmt: skip
    """Some outputs: each is a sum over taps of channels of x times the weights of the tap.

    start: none, one row or one for each output: what the sums begin with. turned: the channels of x
    are the filters' outputs, those of `out` their inputs. copied: patches are copied before they
    are multiplied. block: columns whose weights are put in order at once.
    """
    zero, size, width = x.dtype.type(0), x.itemsize, out.shape[4]
    wide = 2 * BYTES // size
    run, columns, count = x.shape[4] // groups, width // groups, taps.shape[0]
    depth = count * run
    rows = x.shape[0] * steps[COUNT, 0] * steps[COUNT, 1] * steps[COUNT, 2]
    in_all, parts = (rows + HIGH - 1) // HIGH, (columns + block - 1) // block
    panels = np.empty(((block + wide - 1) // wide, max(depth * wide, 1)), x.dtype)
    nothing = np.zeros(max(x.shape[4], width, depth), x.dtype)
    at, places = np.empty((5, HIGH), np.int64), np.empty((2, HIGH), np.int64)
    table = np.empty((1 if copied else max(count, 1), HIGH), np.int64)
    patch = np.empty((HIGH, depth + wide if copied else 1), x.dtype)
    edge, corners = np.empty((2, HIGH, wide), x.dtype), np.empty((2, HIGH), np.int64)
    base, zeros, to, from_ = address(x), address(nothing), address(out), address(start)
    each = 0 if start.shape[0] < 2 else width * size
    lines, matrix, begins, corner = address(table), address(panels), address(places), address(edge)
    pitch, panel_size = patch.shape[1] * size, panels.shape[1] * size
    for r in range(HIGH):
        corners[0, r] = corner + r * 2 * BYTES
        corners[1, r] = corner + (HIGH + r) * 2 * BYTES
        table[0, r] = address(patch) + r * pitch
    corner = address(corners)
    left_taps, left_run = (1, depth) if copied else (count, run)
    # Numbers of the tile after the next; patches that are copied are in the cache.
    ahead = 0 if copied else shift(x, 0, 0, 2 * HIGH * steps[STEP, 2])
    packed = -1
    for item in range(low, high):
        part, tile = item // in_all, item % in_all
        group, first = part // parts, part % parts * block
        last = min(first + block, columns)
        if part != packed:
            packed = part
            _pack(weight, turned, group, first, last, columns, run, taps, panels)
        valid = min(HIGH, rows - tile * HIGH)
        locate(x, base, steps, tile * HIGH, rows, out.shape, at)
        for r in range(HIGH):
            places[0, r] = zeros if start.shape[0] == 0 else from_ + at[OUT, r] * each
            places[1, r] = to + at[OUT, r] * width * size
        if copied:
            for r in range(valid):
                copy_patch(x, spans, at, r, group * run, run, 0, depth, zeros, table[0, r])
        else:
            look_up(x, taps, 0, count, at, group * run * size, zeros, table)
        for begin in range(first, last, wide):
            few, column = min(wide, last - begin), (group * columns + begin) * size
            right = matrix + (begin - first) // wide * panel_size
            if valid == HIGH and few in (wide // 2, wide):
                _multiply(
                    zero, few == wide, lines, ahead, left_taps, left_run, right, begins, column
                )
                continue
            for r in range(valid):
                tiles.copy(zero, few, places[0, r] + column, corners[0, r])
            _multiply(zero, 2 * few > wide, lines, ahead, left_taps, left_run, right, corner, 0)
            for r in range(valid):
                tiles.copy(zero, few, corners[1, r], places[1, r] + column)
    keep(places), keep(corners), keep(table), keep(nothing), keep(edge), keep(patch), keep(panels)


@inline
def _multiply(
    zero: Any, two: bool, left: int, ahead: int, taps: int, run: int, right: int, places: int,
    column: int,
) -> None:  # fmt: skip
    """A tile of outputs by the table `left`; places: two tables, of what sums begin with, and out.

    All are addresses. two: it is of two vectors of columns. ahead: see `tiles.rows_of_two`.
    """
    if two:
        tiles.rows_of_two(zero, left, ahead, taps, run, right, places, places + 8 * HIGH, column)
    else:
        tiles.rows_of_one(zero, left, ahead, taps, run, right, places, places + 8 * HIGH, column)


@inline
def _pack(
    weight: Any, turned: bool, group: int, first: int, last: int, columns: int, run: int,
    taps: Any, panels: Any,
) -> None:  # fmt: skip
    """Put the weights of columns `first` to `last` of a group in order, a panel for each tile."""
    lanes = BYTES // weight.itemsize
    for begin in range(first, last, 2 * lanes):
        panel, few = panels[(begin - first) // (2 * lanes)], min(2 * lanes, last - begin)
        width = 2 * lanes if few > lanes else lanes
        if turned:
            low = group * run
            pack_channels(weight, low, low + run, begin, few, width, taps, panel)
        else:
            pack_filters(weight, group * columns + begin, few, width, panel)


def _tiles(
    g: Any, x: Any, taps: Any, spans: Any, steps: Any, copied: bool, sums: Any
) -> tuple[int, int]:
    """Tiles of rows of the sums, and the work in all."""
    groups, parts, run, _ = sums.shape
    return groups * parts * -(-run // DEEP), sums.size * g.shape[0] // _SPEED


@divided("void(R[:, ::1], R[:, :, :, :, ::1], I[:, ::1], I[:, ::1], I[:, ::1], boolean,"
         " T[:, :, :, ::1])", _tiles, ranges=1)  # fmt: skip
def sum_outputs(
    g: Any, x: Any, taps: Any, spans: Any, steps: Any, copied: bool, sums: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """sums[group, t, c] = sum over outputs of channel c of tap t, times the row of g.

    g (outputs, F); sums (groups, taps, channels, F / groups), the last rounded up to whole vectors.
    copied: patches are copied before they are multiplied, and count as one tap.
    """
    zero, size = x.dtype.type(0), x.itemsize
    groups, parts, run, across = sums.shape
    rows, own, columns = g.shape[0], x.shape[4] // groups, g.shape[1] // groups
    in_part, wide = (run + DEEP - 1) // DEEP, 2 * BYTES // size
    most = max(_SUMS // (size * DEEP * (across + (_ROWS if copied else 0))), 1)
    at, outs = np.empty((5, _ROWS), np.int64), np.empty(DEEP, np.int64)
    nothing, unwanted = np.zeros(max(run, x.shape[4]), x.dtype), np.zeros(across, x.dtype)
    left = np.zeros((_ROWS, -(-DEEP * size // BYTES) * BYTES // size), x.dtype)
    right = np.zeros(((columns + wide - 1) // wide, _ROWS, wide), x.dtype)
    base, zeros, to, waste = address(x), address(nothing), address(sums), address(unwanted)
    while low < high:
        group, tile = low // (parts * in_part), low % (parts * in_part)
        last = min(tile + most, tile + high - low, parts * in_part)
        begin, end = tile // in_part, (last - 1) // in_part + 1
        table = np.empty((end - begin, _ROWS), np.int64)
        # With `copied` there is one part, of which only these numbers are needed.
        start = tile * DEEP if copied else 0
        patch = np.empty((_ROWS, min(last * DEEP, run) - start if copied else 1), x.dtype)
        patches = address(patch)
        for t in range(tile, last):
            place = t % in_part * DEEP
            sums[group, t // in_part, place : place + DEEP] = x.dtype.type(0)
        for first in range(0, rows, _ROWS):
            some = min(_ROWS, rows - first)
            locate(x, base, steps, first, rows, x.shape, at)
            if copied:
                for r in range(some):
                    table[0, r] = patches + r * patch.shape[1] * size
                    copy_patch(
                        x, spans, at, r, group * own, own, start, start + patch.shape[1], zeros,
                        table[0, r],
                    )  # fmt: skip
            else:
                look_up(x, taps, begin, end - begin, at, group * own * size, zeros, table)
            _pack_rows(g, first, some, group * columns, columns, right)
            for t in range(tile, last):
                part, place = t // in_part, t % in_part * DEEP
                few = min(DEEP, run - place)
                tiles.gather(
                    zero, some, few, address(table[part - begin]), (place - start) * size,
                    address(left),
                )  # fmt: skip
                for i in range(DEEP):
                    row = ((group * parts + part) * run + place + i) * across * size
                    outs[i] = to + row if i < few else waste
                _add(left, right, some, columns, outs)
        low += last - tile
        keep(patch)
    keep(nothing), keep(unwanted)


@inline
def _pack_rows(g: Any, first: int, some: int, begin: int, columns: int, panels: Any) -> None:
    """panels[p, r] = some columns of row first + r, from column `begin` on."""
    size, wide = g.itemsize, panels.shape[2]
    for p in range(panels.shape[0]):
        source = address(g) + (first * g.shape[1] + begin + p * wide) * size
        target, few = address(panels[p]), min(wide, columns - p * wide)
        for r in range(some):
            there = target + r * 2 * BYTES
            tiles.copy(g.dtype.type(0), few, source + r * g.shape[1] * size, there)


@inline
def _add(left: Any, right: Any, some: int, columns: int, outs: Any) -> None:
    """Add to a tile of sums the product of `left`, transposed, and all panels of `right`."""
    zero, a, b, to = left.dtype.type(0), address(left), address(right), address(outs)
    wide, pitch = right.shape[2], left.shape[1] * left.itemsize
    for p in range(right.shape[0]):
        column, panel = 2 * p * BYTES, b + p * right.shape[1] * 2 * BYTES
        if columns - p * wide > wide // 2:
            tiles.columns_of_two(zero, a, pitch, some, panel, to, column)
        else:
            tiles.columns_of_one(zero, a, pitch, some, panel, to, column)
