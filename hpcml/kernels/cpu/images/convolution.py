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
    START,
    STEP,
    address,
    copy_patch,
    locate,
    look_up,
    shift,
)
from hpcml.kernels.cpu.images.tiles import BYTES, DEEP, HIGH
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

_SPEED = 32
"""Multiplications and additions in the time of one of `team`'s units of work."""
_LINE = 64
"""Bytes of a line of the cache."""
_ROWS = 256
"""Outputs over which the gradient of weights sums at once."""
_SUMS = 3 << 18
"""Bytes of such sums that are worked on at once: they stay in the second-level cache."""
_FEW = 8
"""Tiles from which on the rows they are multiplied by are worth copying."""


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
    size, width = x.itemsize, out.shape[4]
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
    edge = np.empty((2, HIGH, wide), x.dtype)
    packed = -1
    for item in range(low, high):
        part, tile = item // in_all, item % in_all
        group, first = part // parts, part % parts * block
        last = min(first + block, columns)
        if part != packed:
            packed = part
            _pack(weight, turned, group, first, last, columns, run, taps, panels)
        valid = min(HIGH, rows - tile * HIGH)
        locate(x, steps, tile * HIGH, rows, out.shape, at)
        _place(start, out, nothing, at, places)
        left_taps, left_run, moved = count, run, group * run * size
        if copied:
            left_taps, left_run, moved = 1, depth, 0
            for r in range(HIGH):
                table[0, r] = address(patch[r])
            for r in range(valid):
                copy_patch(x, spans, at, r, group * run, run, 0, depth, nothing, table[0, r])
        else:
            look_up(x, taps, at, nothing, table)
            _ask_ahead(x, taps, steps, at, valid, moved, run)
        for begin in range(first, last, wide):
            _multiply(
                table, moved, left_taps, left_run, panels[(begin - first) // wide],
                min(wide, last - begin), (group * columns + begin) * size, valid, places, edge,
            )  # fmt: skip


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


@inline
def _place(start: Any, out: Any, nothing: Any, at: Any, places: Any) -> None:
    """Addresses of what the sums of each output begin with, and of the output."""
    pitch = out.shape[4] * out.itemsize
    for r in range(HIGH):
        there = at[OUT, r] * pitch
        places[1, r] = address(out) + there
        if start.shape[0] == 0:
            places[0, r] = address(nothing)
        else:
            places[0, r] = address(start) + (there if start.shape[0] > 1 else 0)


@inline
def _ask_ahead(x: Any, taps: Any, steps: Any, at: Any, valid: int, moved: int, run: int) -> None:
    """Ask for what the tile after the next needs and this one does not."""
    if taps.shape[0] == 0:
        return
    last, size = taps[taps.shape[0] - 1], x.itemsize
    further = shift(x, last[0], last[1], last[2] + 2 * HIGH * steps[STEP, 2]) + moved
    for r in range(valid):
        for line in range(0, run * size, _LINE):
            tiles.fetch(x.dtype.type(0), at[START, r] + further + line)


@inline
def _multiply(
    table: Any, moved: int, taps: int, run: int, panel: Any, few: int, column: int, valid: int,
    places: Any, edge: Any,
) -> None:  # fmt: skip
    """A tile of `valid` rows and `few` columns; through a scratch tile if it is not a whole one."""
    zero, lanes = panel.dtype.type(0), BYTES // panel.itemsize
    begins, outs = address(places[0]), address(places[1])
    whole = valid == HIGH and few in (lanes, 2 * lanes)
    scratch = np.empty((2, HIGH), np.int64)
    if not whole:
        for r in range(HIGH):
            scratch[0, r], scratch[1, r] = address(edge[0, r]), address(edge[1, r])
        for r in range(valid):
            tiles.copy(zero, few, places[0, r] + column, scratch[0, r])
        begins, outs = address(scratch[0]), address(scratch[1])
    further, left, right = column if whole else 0, address(table), address(panel)
    if few > lanes:
        tiles.rows_of_two(zero, left, moved, taps, run, right, begins, outs, further)
    else:
        tiles.rows_of_one(zero, left, moved, taps, run, right, begins, outs, further)
    if not whole:
        for r in range(valid):
            tiles.copy(zero, few, scratch[1, r], places[1, r] + column)


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
    size = x.itemsize
    groups, parts, run, across = sums.shape
    rows, own = g.shape[0], x.shape[4] // groups
    of_group = parts * ((run + DEEP - 1) // DEEP)
    most = max(_SUMS // (size * DEEP * (across + (_ROWS if copied else 0))), 1)
    at = np.empty((5, _ROWS), np.int64)
    nothing, unwanted = np.zeros(max(run, x.shape[4]), x.dtype), np.zeros(across, x.dtype)
    right = np.zeros((_ROWS, 2 * BYTES // size), x.dtype)
    while low < high:
        group, tile = low // of_group, low % of_group
        count = min(most, high - low, of_group - tile)
        lines, starts = np.empty(count, np.int64), np.empty(count, np.int64)
        outs = np.empty((count, DEEP), np.int64)
        _begin(sums[group], tile, unwanted, lines, starts, outs)
        first_line, last_line = lines[0], lines[count - 1] + 1
        begin, end = starts[0], min(starts[count - 1] + DEEP, run)
        table = np.empty((1 if copied else last_line - first_line, _ROWS), np.int64)
        patch = np.zeros((_ROWS, max(end - begin, DEEP) if copied else 1), x.dtype)
        for t in range(count):
            lines[t] -= first_line
            starts[t] = (starts[t] - begin if copied else group * own + starts[t]) * size
        for first in range(0, rows, _ROWS):
            some = min(_ROWS, rows - first)
            locate(x, steps, first, rows, x.shape, at)
            if copied:
                for r in range(some):
                    table[0, r] = address(patch[r])
                    copy_patch(x, spans, at, r, group * own, own, begin, end, nothing, table[0, r])
            else:
                look_up(x, taps[first_line:last_line], at, nothing, table)
            _add(g, first, some, group, groups, table, lines, starts, outs, right)
        low += count


@inline
def _begin(sums: Any, tile: int, unwanted: Any, lines: Any, starts: Any, outs: Any) -> None:
    """Of tiles from number `tile` on: their taps, their first channels, addresses of their sums.

    What a tile has in common with the one before is not wanted: it may not read beyond a row.
    """
    _, run, _ = sums.shape
    of_part = (run + DEEP - 1) // DEEP
    for t in range(starts.size):
        line, place = (tile + t) // of_part, (tile + t) % of_part * DEEP
        lines[t], starts[t] = line, max(min(place, run - DEEP), 0)
        for i in range(DEEP):
            row = starts[t] + i
            outs[t, i] = address(unwanted)
            if place <= row < min(place + DEEP, run):
                sums[line, row] = sums.dtype.type(0)
                outs[t, i] = address(sums[line, row])


@inline
def _add(
    g: Any, first: int, some: int, group: int, groups: int, table: Any, lines: Any, starts: Any,
    outs: Any, right: Any,
) -> None:  # fmt: skip
    """Add the products of `some` outputs to the sums of some tiles."""
    zero, size = g.dtype.type(0), g.itemsize
    lanes, columns, row = BYTES // size, g.shape[1] // groups, g.shape[1] * size
    for column in range(0, columns, 2 * lanes):
        few = min(2 * lanes, columns - column)
        source, pitch = address(g) + first * row + (group * columns + column) * size, row
        if few not in (lanes, 2 * lanes) or lines.size >= _FEW:
            for r in range(some):
                tiles.copy(zero, few, source + r * pitch, address(right[r]))
            source, pitch = address(right), 2 * BYTES
        for t in range(lines.size):
            left, to = address(table[lines[t]]), address(outs[t])
            if few > lanes:
                tiles.columns_of_two(zero, left, starts[t], some, source, pitch, to, column * size)
            else:
                tiles.columns_of_one(zero, left, starts[t], some, source, pitch, to, column * size)
