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
    x: Any, taps: Any, first: int, count: int, at: Any, moved: int, zeros: int, table: Any
) -> None:  # fmt: skip
    """table[t, r] = address of the channels of tap first + t, moved, or `zeros` beyond the edge."""
    _, depth, height, width, _ = x.shape
    for t in range(count):
        dz, dy, dx = taps[first + t, 0], taps[first + t, 1], taps[first + t, 2]
        further = shift(x, dz, dy, dx) + moved
        for r in range(table.shape[1]):
            inside = _within(at[Z, r] + dz, depth) & _within(at[Y, r] + dy, height)
            inside &= _within(at[X, r] + dx, width)
            table[t, r] = at[START, r] + further if inside else zeros


@inline
def copy_patch(
    x: Any, spans: Any, at: Any, r: int, channel: int, run: int, low: int, high: int,
    zeros: int, target: int,
) -> None:  # fmt: skip
    """Copy numbers low to high of patch r, `run` channels from `channel` on for each tap."""
    _, depth, height, width, channels = x.shape
    zero, size = x.dtype.type(0), x.itemsize
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
