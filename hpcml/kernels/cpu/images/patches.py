"""Where the numbers lie that an output of a convolution is made of.

Arrays have three spatial dimensions here, of which the first may have one place. Tables: `taps` has
for each tap of the filter its offset (z, y, x) in the input from the place of an output, and its
number in the filter; `spans` has runs of taps that lie side by side: number of the first, how many,
offset of the first; `steps` says how outputs lie (`COUNT` and so on).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import moves
from hpcml.kernels.cpu.jit import inline

COUNT, FIRST, SPACING, STEP = 0, 1, 2, 3
"""Rows of `steps`: how many outputs there are along each dimension, the place of the first in the
array of outputs, from one to the next there, and from one to the next in the input."""
Z, Y, X, START, OUT = 0, 1, 2, 3, 4
"""Rows of what `locate` fills in."""

_NOWHERE = -(1 << 40)


@inline
def address(x: Any) -> Any:
    """That of the first element.

    Not for innermost loops: it counts a reference to the array, and counting waits until all that
    was stored before has reached the cache. `keep` the array while only its address is used.
    """
    return np.int64(x.ctypes.data)


@inline
def keep(x: Any) -> None:
    """Nothing; but the array exists until here."""


@inline
def shift(x: Any, dz: int, dy: int, dx: int) -> Any:
    """Bytes from a place in x (N, D, H, W, C) to that at an offset."""
    return ((dz * x.shape[2] + dy) * x.shape[3] + dx) * x.shape[4] * x.itemsize


@inline
def locate(
    x: Any, base: int, steps: Any, first: int, rows: int, out: Any, at: Any
) -> None:  # fmt: skip
    """Where outputs first, first + 1, ... lie, for each column of `at`; beyond `rows`: nowhere.

    Z, Y, X: place in the input of offset 0; START: address of its channels, x being at `base`; OUT:
    number of the output in the shape `out`.
    """
    w, rest = first % steps[COUNT, 2], first // steps[COUNT, 2]
    h, rest = rest % steps[COUNT, 1], rest // steps[COUNT, 1]
    d, n = rest % steps[COUNT, 0], rest // steps[COUNT, 0]
    for r in range(at.shape[1]):
        if first + r >= rows:
            at[Z, r] = at[Y, r] = at[X, r] = _NOWHERE
            at[START, r] = at[OUT, r] = 0
            continue
        at[Z, r], at[Y, r] = d * steps[STEP, 0], h * steps[STEP, 1]
        at[X, r] = w * steps[STEP, 2]
        at[START, r] = base + shift(x, n * x.shape[1] + at[Z, r], at[Y, r], at[X, r])
        z = steps[FIRST, 0] + d * steps[SPACING, 0]
        y = steps[FIRST, 1] + h * steps[SPACING, 1]
        at[OUT, r] = ((n * out[1] + z) * out[2] + y) * out[3] + (
            steps[FIRST, 2] + w * steps[SPACING, 2]
        )
        w += 1
        if w == steps[COUNT, 2]:
            w, h = 0, h + 1
            if h == steps[COUNT, 1]:
                h, d = 0, d + 1
                if d == steps[COUNT, 0]:
                    d, n = 0, n + 1


@inline
def _within(place: Any, size: Any) -> Any:
    """Whether 0 <= place < size, in one comparison."""
    return np.uint64(place) < np.uint64(size)


@inline
def look_up(
    x: Any, spans: Any, first: int, count: int, at: Any, channel: int, run: int, zeros: int,
    patches: int, pitch: int, table: Any,
) -> None:  # fmt: skip
    """table[s, r] = address of what span first + s meets: `run` channels for each tap, or zeros.

    Beyond the edge there are zeros. What lies across it is put together in row r of `patches`,
    which are `pitch` bytes apart.
    """
    _, depth, height, width, _ = x.shape
    for s in range(count):
        taps, dz, dy, dx = (
            spans[first + s, 1],
            spans[first + s, 2],
            spans[first + s, 3],
            spans[first + s, 4],
        )
        further, fit = shift(x, dz, dy, dx) + channel * x.itemsize, max(width - taps + 1, 0)
        for r in range(table.shape[1]):
            inside = _within(at[Z, r] + dz, depth) & _within(at[Y, r] + dy, height)
            inside &= _within(at[X, r] + dx, fit)
            table[s, r] = at[START, r] + further if inside else zeros
    if spans[first, 1] > 1:
        _look_across(x, spans, first, count, at, channel, run, zeros, patches, pitch, table)


@inline
def _look_across(
    x: Any, spans: Any, first: int, count: int, at: Any, channel: int, run: int, zeros: int,
    patches: int, pitch: int, table: Any,
) -> None:  # fmt: skip
    """The same of those that lie across the edge: spans of several taps differ in rows only."""
    _, depth, height, width, _ = x.shape
    taps, dx, size = spans[first, 1], spans[first, 4], x.itemsize
    for r in range(table.shape[1]):
        left, right = max(-at[X, r] - dx, 0), max(at[X, r] + dx + taps - width, 0)
        if not 0 < max(left, right) < taps:
            continue
        for s in range(count):
            dz, dy = spans[first + s, 2], spans[first + s, 3]
            if _within(at[Z, r] + dz, depth) and _within(at[Y, r] + dy, height):
                source = at[START, r] + shift(x, dz, dy, dx) + channel * size
                table[s, r] = patches + r * pitch + s * taps * run * size
                _join(x, source, taps, run, left, right, zeros, table[s, r])


@inline
def _join(
    x: Any, source: int, taps: int, run: int, left: int, right: int, zeros: int, target: int
) -> None:  # fmt: skip
    """Copy `run` channels for each tap, zeros for the first `left` and the last `right` of them."""
    zero, size = x.dtype.type(0), run * x.itemsize
    moves.copy(zero, left * run, zeros, target)
    moves.copy(zero, (taps - left - right) * run, source + left * size, target + left * size)
    moves.copy(zero, right * run, zeros, target + (taps - right) * size)
