"""Convolutions and their adjoints: which way is taken, and the tables that say what meets what.

x (N, *S, C), out (N, *S', F), weight (F, C / groups, *K): channels last, weights as PyTorch has
them. Any number of spatial dimensions up to three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml.kernels.cpu.images.convolution import SUMS, sum_outputs, sum_taps
from hpcml.kernels.cpu.images.order import order_sums
from hpcml.kernels.cpu.images.tiles import BYTES

Sizes = tuple[int, ...]

_WEIGHTS = 1 << 19
"""Bytes of weights that are put in order at once: they stay in the second-level cache."""
_SHORT = 16
"""Channels below which taps side by side are looked up at once: each takes as long as that many."""
_PAGE = 4096
"""Bytes between rows that share their places in the first-level cache."""


def convolve(
    x: Any, weight: Any, start: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int,
    out: Any,
) -> None:  # fmt: skip
    """out[n, p, f] = start + sum over k and c of x[n, p stride - before + k dilation, c] weight.

    start: what the sums begin with: (F), or like out, or empty for 0.
    """
    size = weight.shape[2:]
    taps = [(*offset, number) for number, offset in enumerate(_offsets(size, before, dilation))]
    steps = [out.shape[1:-1], (0,) * len(size), (1,) * len(size), stride]
    _sum_taps(x, weight, start, taps, steps, groups, False, out)


def convolve_input_gradient(
    g: Any, weight: Any, start: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int,
    out: Any,
) -> None:  # fmt: skip
    """out = start + the adjoint of `convolve` with respect to x, at g.

    Along a dimension of stride s the places of x fall into s classes; each meets other taps, if
    any.
    """
    size = weight.shape[2:]
    if any(s > 1 and len({i * d % s for i in range(k)}) < s
           for k, s, d in zip(size, stride, dilation, strict=True)):  # fmt: skip
        out[...] = start if start.size else 0
    numbers = np.arange(math.prod(size)).reshape(size)
    for first in itertools.product(*map(range, stride)):
        along = []
        for r, k, s, b, d in zip(first, size, stride, before, dilation, strict=True):
            met = [(r + b - i * d, i) for i in reversed(range(k))]
            along.append([(offset // s, i) for offset, i in met if offset % s == 0])
        taps = [
            (*(offset for offset, _ in tap), numbers[tuple(i for _, i in tap)])
            for tap in itertools.product(*along)
        ]
        count = [-(-(n - r) // s) for n, r, s in zip(out.shape[1:-1], first, stride, strict=True)]
        if taps and min(count) > 0:
            steps = [count, first, stride, (1,) * len(size)]
            _sum_taps(g, weight, start, taps, steps, groups, True, out)


def convolve_weight_gradient(
    g: Any, x: Any, stride: Sizes, before: Sizes, dilation: Sizes, groups: int, out: Any
) -> None:
    """out = the adjoint of `convolve` with respect to the weights: g (N, *S', F), x (N, *S, C)."""
    (filters, run), size = out.shape[:2], out.shape[2:]
    steps = [g.shape[1:-1], (0,) * len(size), (1,) * len(size), stride]
    # Where g and x lie alike they may be exchanged. It is faster if x has fewer channels; but if
    # the sums do not fit in the cache, g is put in order again for each part of them.
    alike = groups == math.prod(size) == math.prod(stride) == 1 and not any(before)
    if alike and (filters < run) != (out.nbytes > SUMS):
        out[...] = _sum_outputs(x, g, [(0,) * len(size)], steps, 1)[0, :, :run].reshape(out.shape)
        return
    sums = _sum_outputs(g, x, list(_offsets(size, before, dilation)), steps, groups)
    order_sums(sums, out.reshape(filters, run, math.prod(size)))


def _sum_outputs(
    g: Any, x: Any, offsets: Sequence[Sizes], steps: Sequence[Sequence[int]], groups: int
) -> Any:
    """What `sum_outputs` makes of g (N, *S', F) and x (N, *S, C) for taps at these offsets."""
    run, rows = x.shape[-1] // groups, g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
    lanes, depth, short = BYTES // x.itemsize, len(offsets) * run, run < _SHORT
    across = -(-g.shape[-1] // groups // lanes) * lanes
    sums = np.empty((groups, depth, across), x.dtype)
    spans = _spans(offsets, groups == 1 and short)
    sum_outputs(rows, _five(x), spans, _steps(steps), depth if short else run, sums)
    return sums


def _sum_taps(
    x: Any, weight: Any, start: Any, taps: Sequence[Sizes], steps: Sequence[Sequence[int]],
    groups: int, turned: bool, out: Any,
) -> None:  # fmt: skip
    run, columns = x.shape[-1] // groups, out.shape[-1] // groups
    wide = 2 * BYTES // x.itemsize
    panel = max(len(taps) * run, 1) * wide * x.itemsize
    block = min(max(_WEIGHTS // panel, 1) * wide, columns)
    spans = _spans([tap[:-1] for tap in taps], groups == 1 and run < _SHORT)
    # Rows of a tile a whole number of pages apart would drive each other out of the cache.
    copied = len(taps) == 1 and run * x.itemsize % _PAGE == 0
    sum_taps(
        _five(x), weight.reshape(*weight.shape[:2], math.prod(weight.shape[2:])),
        start.reshape(-1, out.shape[-1]), _table(taps), spans, _steps(steps), groups, turned,
        copied, block, _five(out),
    )  # fmt: skip


def _offsets(size: Sizes, before: Sizes, dilation: Sizes) -> Any:
    """For each tap of a filter its offset in the input from the place of an output."""
    along = zip(size, before, dilation, strict=True)
    return itertools.product(*([i * d - b for i in range(k)] for k, b, d in along))


def _table(taps: Sequence[Sizes]) -> Any:
    """The table of taps: offsets along three dimensions, and the number in the filter."""
    rows = [(*(0,) * (4 - len(tap)), *tap) for tap in taps]
    return np.array(rows, np.int64)


def _spans(offsets: Sequence[Sizes], joined: bool) -> Any:
    """The table of spans: of one tap each or, joined, of as many as lie side by side in a row.

    Taps are a product of offsets along each dimension, so that all spans have as many.
    """
    spans: list[list[int]] = []
    for number, (*rest, last) in enumerate(offsets):
        if joined and spans and spans[-1][2:] == [*rest, last - spans[-1][1]]:
            spans[-1][1] += 1
        else:
            spans.append([number, 1, *rest, last])
    rows = [(*span[:2], *(0,) * (5 - len(span)), *span[2:]) for span in spans]
    return np.array(rows, np.int64)


def _steps(rows: Sequence[Sequence[int]]) -> Any:
    """The table of steps: one place along dimensions that are missing."""
    fill = (1, 0, 1, 1)
    three = [(*(f,) * (3 - len(row)), *row) for f, row in zip(fill, rows, strict=True)]
    return np.array(three, np.int64)


def _five(x: Any) -> Any:
    """x with three dimensions between the first and the last."""
    return x.reshape(x.shape[0], *(1,) * (5 - x.ndim), *x.shape[1:])
