"""The products that convolutions are made of, without an array of columns.

Forward and the gradient of the input are products whose left rows are looked up: a table has the
address of the channels for each tap of the filter and each output of a tile, or that of zeros
beyond the edge (Dukhan 2019, "The Indirect Convolution Algorithm"). So stride, padding, dilation,
and one to three dimensions need no code of their own. Taps of few channels that lie side by side
have one entry in the table, a span: their channels follow each other in memory. The gradient of the
weights multiplies the same rows, transposed, by the gradient of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import moves, tiles
from hpcml.kernels.cpu.images.order import pack_channels, pack_filters
from hpcml.kernels.cpu.images.patches import (
    COUNT,
    OUT,
    STEP,
    address,
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
_DENSE = 4
"""Bytes of an output and its inputs for each tile and panel: from so many on the next ones are
asked for early; where there are fewer, the products take longer than reading."""
_EARLY = 1 << 19
"""Bytes that are asked for early at most: they stay in the second-level cache beside the sums."""
SUMS = 3 << 18
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
    are the filters' outputs, those of `out` their inputs. copied: channels are copied before they
    are multiplied, of one tap. block: columns whose weights are put in order at once.
    """
    zero, size, width = x.dtype.type(0), x.itemsize, out.shape[4]
    wide = 2 * BYTES // size
    run, columns, count = x.shape[4] // groups, width // groups, spans.shape[0]
    depth = taps.shape[0] * run
    rows = x.shape[0] * steps[COUNT, 0] * steps[COUNT, 1] * steps[COUNT, 2]
    in_all, parts = (rows + HIGH - 1) // HIGH, (columns + block - 1) // block
    panels = np.empty(((block + wide - 1) // wide, max(depth * wide, 1)), x.dtype)
    nothing = np.zeros(max(x.shape[4], width, depth), x.dtype)
    at, places = np.empty((5, HIGH), np.int64), np.empty((2, HIGH), np.int64)
    table, patch = np.empty((count, HIGH), np.int64), np.empty((HIGH, depth + wide), x.dtype)
    edge, corners = np.empty((2, HIGH, wide), x.dtype), np.empty((2, HIGH), np.int64)
    base, zeros, to, from_ = address(x), address(nothing), address(out), address(start)
    each = 0 if start.shape[0] < 2 else width * size
    lines, matrix, begins, corner = address(table), address(panels), address(places), address(edge)
    pitch, panel_size = patch.shape[1] * size, panels.shape[1] * size
    for r in range(HIGH):
        corners[0, r] = corner + r * 2 * BYTES
        corners[1, r] = corner + (HIGH + r) * 2 * BYTES
    corner, patches = address(corners), address(patch)
    # Numbers of the tile after the next; what is copied is in the cache.
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
        look_up(x, spans, 0, count, at, group * run, run, zeros, patches, pitch, table)
        for r in range(valid if copied else 0):
            there = patches + r * pitch
            moves.copy(zero, depth, table[0, r], there)
            table[0, r] = there
        for begin in range(first, last, wide):
            few, column = min(wide, last - begin), (group * columns + begin) * size
            right = matrix + (begin - first) // wide * panel_size
            if valid == HIGH and few in (wide // 2, wide):
                _multiply(
                    zero, few == wide, lines, ahead, count, depth // count, right, begins, column
                )
                continue
            for r in range(valid):
                moves.copy(zero, few, places[0, r] + column, corners[0, r])
            _multiply(zero, 2 * few > wide, lines, ahead, count, depth // count, right, corner, 0)
            for r in range(valid):
                moves.copy(zero, few, corners[1, r], places[1, r] + column)
    keep(places), keep(corners), keep(table), keep(nothing), keep(edge), keep(patch), keep(panels)


@inline
def _multiply(
    zero: Any, two: bool, left: int, ahead: int, spans: int, run: int, right: int, places: int,
    column: int,
) -> None:  # fmt: skip
    """A tile of outputs by the table `left`; places: two tables, of what sums begin with, and out.

    All are addresses. two: it is of two vectors of columns. ahead: see `tiles.rows_of_two`.
    """
    if two:
        tiles.rows_of_two(zero, left, ahead, spans, run, right, places, places + 8 * HIGH, column)
    else:
        tiles.rows_of_one(zero, left, ahead, spans, run, right, places, places + 8 * HIGH, column)


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


def _tiles(g: Any, x: Any, spans: Any, steps: Any, part: int, sums: Any) -> tuple[int, int]:
    """Tiles of rows of the sums, and the work in all."""
    groups, depth, _ = sums.shape
    return groups * (depth // part) * -(-part // DEEP), sums.size * g.shape[0] // _SPEED


@divided("void(R[:, ::1], R[:, :, :, :, ::1], I[:, ::1], I[:, ::1], int64, T[:, :, ::1])", _tiles,
         ranges=1)  # fmt: skip
def sum_outputs(
    g: Any, x: Any, spans: Any, steps: Any, part: int, sums: Any, low: int, high: int
) -> None:  # fmt: skip
    """sums[group, n] = sum over outputs of number n of all spans, times the row of g.

    g (outputs, F); sums (groups, numbers, F / groups), the last rounded up to whole vectors. part:
    how many numbers are divided into tiles by themselves.
    """
    zero, size = x.dtype.type(0), x.itemsize
    groups, depth, across = sums.shape
    rows, run, columns = g.shape[0], x.shape[4] // groups, g.shape[1] // groups
    in_all, length = depth // part * ((part + DEEP - 1) // DEEP), depth // spans.shape[0]
    panels, wide = (columns * size + 2 * BYTES - 1) // (2 * BYTES), 2 * BYTES // size
    most = max(SUMS // (size * DEEP * across), 1)
    at, outs = np.empty((5, _ROWS), np.int64), np.empty(DEEP, np.int64)
    nothing, unwanted = np.zeros(max(length, x.shape[4]), x.dtype), np.zeros(across, x.dtype)
    left = np.zeros((_ROWS, -(-DEEP * size // BYTES) * BYTES // size), x.dtype)
    right = np.zeros((panels, _ROWS, wide), x.dtype)
    base, zeros, to, waste = address(x), address(nothing), address(sums), address(unwanted)
    # Bytes of an output, of its inputs, of both in a block; where those of the first block begin.
    of_g, of_x = g.shape[1] * size, x.size // max(rows, 1) * size
    block, from_ = _ROWS * (of_g + of_x), address(g)
    beyond = base + shift(x, spans[-1, 2], spans[-1, 3], spans[-1, 4])
    while low < high:
        group, tile = low // in_all, low % in_all
        last = min(tile + most, tile + high - low, in_all)
        numbers, until = _begin(tile, part), _begin(last, part)
        begin, end = numbers // length, (until - 1) // length + 1
        table = np.empty((end - begin, _ROWS), np.int64)
        patch = np.empty((_ROWS, (end - begin) * length if spans[0, 1] > 1 else 1), x.dtype)
        sums[group, numbers:until] = zero
        pace = 0
        if _DENSE * _ROWS * in_all * panels <= block <= _EARLY:
            pace = min(block // (_ROWS * (last - tile) * panels) + 1, 64)
        for first in range(0, rows, _ROWS):
            some = min(_ROWS, rows - first)
            locate(x, base, steps, first, rows, x.shape, at)
            look_up(
                x, spans, begin, end - begin, at, group * run, run, zeros, address(patch),
                patch.shape[1] * size, table,
            )  # fmt: skip
            _pack_rows(g, first, some, group * columns, columns, right)
            for t in range(tile, last):
                number = _begin(t, part)
                few = _begin(t + 1, part) - number
                _gather(table, number - begin * length, few, length, some, left)
                for i in range(DEEP):
                    row = (group * depth + number + i) * across * size
                    outs[i] = to + row if i < few else waste
                asked = (t - tile) * panels * _ROWS * pace
                ahead = from_ + (first + _ROWS) * of_g + asked
                if asked >= _ROWS * of_g:
                    ahead = beyond + (first + _ROWS) * of_x + asked - _ROWS * of_g
                _add(left, right, some, columns, outs, ahead, pace)
        low += last - tile
        keep(patch)
    keep(nothing), keep(unwanted)


@inline
def _begin(tile: int, part: int) -> Any:
    """The first number of a tile, where the tile before it ends."""
    in_part = (part + DEEP - 1) // DEEP
    return tile // in_part * part + tile % in_part * DEEP


@inline
def _gather(table: Any, first: int, few: int, length: int, some: int, left: Any) -> None:
    """left[r, i] = number first + i of the spans of row r, which are `length` numbers each."""
    done, size, to = 0, left.itemsize, address(left)
    while done < few:
        span, place = (first + done) // length, (first + done) % length
        count = min(few - done, length - place)
        sources = address(table) + span * table.shape[1] * 8
        moves.gather(left.dtype.type(0), some, count, sources, place * size, to + done * size)
        done += count


@inline
def _pack_rows(g: Any, first: int, some: int, begin: int, columns: int, panels: Any) -> None:
    """panels[p, r] = some columns of row first + r, from column `begin` on."""
    size, wide = g.itemsize, panels.shape[2]
    for p in range(panels.shape[0]):
        source = address(g) + (first * g.shape[1] + begin + p * wide) * size
        target, few = address(panels[p]), min(wide, columns - p * wide)
        for r in range(some):
            there = target + r * 2 * BYTES
            moves.copy(g.dtype.type(0), few, source + r * g.shape[1] * size, there)


@inline
def _add(
    left: Any, right: Any, some: int, columns: int, outs: Any, ahead: int, pace: int
) -> None:  # fmt: skip
    """Add to a tile of sums the product of `left`, transposed, and all panels of `right`."""
    zero, a, b, to = left.dtype.type(0), address(left), address(right), address(outs)
    wide, pitch = right.shape[2], left.shape[1] * left.itemsize
    for p in range(right.shape[0]):
        column, panel = 2 * p * BYTES, b + p * right.shape[1] * 2 * BYTES
        if columns - p * wide <= wide // 2:
            tiles.columns_of_one(zero, a, pitch, some, panel, to, column, 0, 0)
        elif pace > 0:
            tiles.columns_fetching(zero, a, pitch, some, panel, to, column, ahead, pace)
        else:
            tiles.columns_of_two(zero, a, pitch, some, panel, to, column, 0, 0)
        ahead += some * pace
