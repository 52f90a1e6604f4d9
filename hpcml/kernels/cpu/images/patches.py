"""Where the numbers lie that an output of a convolution is made of: looked up, or copied.

Arrays have three spatial dimensions here, of which the first may have one place. Tables: `taps` has
for each tap of the filter its offset (z, y, x) in the input from the place of an output, and its
number in the filter; `spans` has runs of taps that lie side by side: number of the first, how many,
offset of the first; `steps` says how outputs lie (`COUNT` and so on).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import tiles
from hpcml.kernels.cpu.jit import inline

COUNT, FIRST, SPACING, STEP = 0, 1, 2, 3
"""Rows of `steps`: how many outputs there are along each dimension, the place of the first in the
array of outputs, from one to the next there, and from one to the next in the input."""
Z, Y, X, START, OUT = 0, 1, 2, 3, 4
"""Rows of what `locate` fills in."""

_NOWHERE = -(1 << 40)


@inline
def address(x: Any) -> Any:
    """That of the first element."""
    return np.int64(x.ctypes.data)


@inline
def shift(x: Any, dz: int, dy: int, dx: int) -> Any:
    """Bytes from a place in x (N, D, H, W, C) to that at an offset."""
    return ((dz * x.shape[2] + dy) * x.shape[3] + dx) * x.shape[4] * x.itemsize


@inline
def locate(x: Any, steps: Any, first: int, rows: int, out: Any, at: Any) -> None:
    """Where outputs first, first + 1, ... lie, for each column of `at`; beyond `rows`: nowhere.

    Z, Y, X: place in the input of offset 0; START: address of its channels in x; OUT: number of the
    output in the shape `out`.
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
        at[START, r] = address(x) + shift(x, n * x.shape[1] + at[Z, r], at[Y, r], at[X, r])
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
def look_up(x: Any, taps: Any, at: Any, nothing: Any, table: Any) -> None:
    """table[t, r] = address of the channels of tap t, or that of `nothing` beyond the edge."""
    _, depth, height, width, _ = x.shape
    zeros = address(nothing)
    zs, ys, xs, starts = at[Z], at[Y], at[X], at[START]
    for t in range(taps.shape[0]):
        dz, dy, dx, row = taps[t, 0], taps[t, 1], taps[t, 2], table[t]
        further = shift(x, dz, dy, dx)
        for r in range(row.size):
            inside = _within(zs[r] + dz, depth) & _within(ys[r] + dy, height)
            inside &= _within(xs[r] + dx, width)
            row[r] = starts[r] + further if inside else zeros


@inline
def copy_patch(
    x: Any, spans: Any, at: Any, r: int, channel: int, run: int, low: int, high: int,
    nothing: Any, target: Any,
) -> None:  # fmt: skip
    """Copy numbers low to high of patch r, `run` channels from `channel` on for each tap."""
    _, depth, height, width, channels = x.shape
    zero, size, zeros = x.dtype.type(0), x.itemsize, address(nothing)
    for s in range(spans.shape[0]):
        tap, count, dz, dy, dx = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3], spans[s, 4]
        first, last = max(tap * run, low), min((tap + count) * run, high)
        if first >= last:
            continue
        there, w = target + (first - low) * size, at[X, r] + dx
        if not (_within(at[Z, r] + dz, depth) and _within(at[Y, r] + dy, height)):
            tiles.copy(zero, last - first, zeros, there)
            continue
        source = at[START, r] + shift(x, dz, dy, dx) + channel * size
        if w >= 0 and w + count <= width:
            tiles.copy(zero, last - first, source + (first - tap * run) * size, there)
            continue
        for k in range(count):
            begin, end = max((tap + k) * run, low), min((tap + k + 1) * run, high)
            if begin < end:
                place = source + (k * channels + begin - (tap + k) * run) * size
                place = place if _within(w + k, width) else zeros
                tiles.copy(zero, end - begin, place, target + (begin - low) * size)
