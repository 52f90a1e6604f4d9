"""Windows over images, channels last: their maximum; and weighted means along one dimension."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided

Sizes = tuple[int, ...]
SIZE, STRIDE, BEFORE, DILATION = 0, 1, 2, 3


def max_pool(
    x: Any, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Any, index: Any
) -> None:
    """out = the maximum of each window, index = the number of its tap: the first of equal ones.

    x (N, *S, C), out, index (N, *S', C), index of uint16. The last NaN counts as the largest.
    """
    table = _table(size, stride, before, dilation)
    _max_pool(_five(x), table, _five(out), _five(index))


def max_pool_backward(
    g: Any, index: Any, size: Sizes, stride: Sizes, before: Sizes, dilation: Sizes, out: Any
) -> None:
    """out = each gradient added at the place of its window's maximum."""
    table = _table(size, stride, before, dilation)
    _max_pool_backward(_five(g), _five(index), table, _five(out))


def _table(*rows: Sizes) -> Any:
    """Sizes, strides, padding before and dilation along three dimensions."""
    fill = (1, 1, 0, 1)
    three = [(*(f,) * (3 - len(row)), *row) for f, row in zip(fill, rows, strict=True)]
    return np.array(three, np.int64)


def _five(x: Any) -> Any:
    """x with three dimensions between the first and the last."""
    return x.reshape(x.shape[0], *(1,) * (5 - x.ndim), *x.shape[1:])


def _lines(x: Any, window: Any, out: Any, index: Any) -> tuple[int, int]:
    """Lines of outputs, and the work."""
    n, d, h, _, _ = out.shape
    return n * d * h, out.size * int(window[SIZE].prod())


@divided("void(R[:, :, :, :, ::1], I[:, ::1], T[:, :, :, :, ::1], uint16[:, :, :, :, ::1])", _lines)
def _max_pool(x: Any, window: Any, out: Any, index: Any, low: int, high: int) -> None:
    _, depth, height, width, channels = x.shape
    size, stride, before, dilation = window[SIZE], window[STRIDE], window[BEFORE], window[DILATION]
    for line in range(low, high):
        h, rest = line % out.shape[2], line // out.shape[2]
        d, n = rest % out.shape[1], rest // out.shape[1]
        for w in range(out.shape[3]):
            best, which, found = out[n, d, h, w], index[n, d, h, w], False
            for i in range(size[0]):
                z = d * stride[0] - before[0] + i * dilation[0]
                for j in range(size[1]):
                    y = h * stride[1] - before[1] + j * dilation[1]
                    for k in range(size[2]):
                        v = w * stride[2] - before[2] + k * dilation[2]
                        if not (0 <= z < depth and 0 <= y < height and 0 <= v < width):
                            continue
                        row, tap = x[n, z, y, v], np.uint16((i * size[1] + j) * size[2] + k)
                        if not found:
                            best[:], which[:] = row, tap
                            found = True
                            continue
                        for c in range(channels):
                            value, most = row[c], best[c]
                            better = (value > most) | (value != value)
                            best[c] = value if better else most
                            which[c] = tap if better else which[c]
            if not found:
                best[:], which[:] = -np.inf, np.uint16(0)


@inline
def _first(place: int, size: int, stride: int, dilation: int) -> Any:
    """The first window that can reach a place, counted from the start of the padding."""
    beyond = place - (size - 1) * dilation
    return max(0, (beyond + stride - 1) // stride)


def _inputs(g: Any, index: Any, window: Any, out: Any) -> tuple[int, int]:
    """Lines of inputs, and the work."""
    n, d, h, _, _ = out.shape
    return n * d * h, g.size * int(window[SIZE].prod())


@divided("void(R[:, :, :, :, ::1], H[:, :, :, :, ::1], I[:, ::1], T[:, :, :, :, ::1])", _inputs)
def _max_pool_backward(g: Any, index: Any, window: Any, out: Any, low: int, high: int) -> None:
    """Each input looks which of the windows that reach it have their maximum there."""
    _, depth, height, width, channels = g.shape
    size, stride, before, dilation = window[SIZE], window[STRIDE], window[BEFORE], window[DILATION]
    zero = g.dtype.type(0)
    for line in range(low, high):
        y, rest = line % out.shape[2] + before[1], line // out.shape[2]
        z, n = rest % out.shape[1] + before[0], rest // out.shape[1]
        first_d = _first(z, size[0], stride[0], dilation[0])
        first_h = _first(y, size[1], stride[1], dilation[1])
        for place in range(out.shape[3]):
            total, x = out[n, z - before[0], y - before[1], place], place + before[2]
            total[:] = zero
            for d in range(first_d, min(z // stride[0] + 1, depth)):
                i = z - d * stride[0]
                if i % dilation[0] != 0:
                    continue
                for h in range(first_h, min(y // stride[1] + 1, height)):
                    j = y - h * stride[1]
                    if j % dilation[1] != 0:
                        continue
                    first_w = _first(x, size[2], stride[2], dilation[2])
                    for w in range(first_w, min(x // stride[2] + 1, width)):
                        k = x - w * stride[2]
                        if k % dilation[2] != 0:
                            continue
                        tap = (i // dilation[0] * size[1] + j // dilation[1]) * size[2]
                        tap += k // dilation[2]
                        row, which = g[n, d, h, w], index[n, d, h, w]
                        for c in range(channels):
                            total[c] += row[c] if which[c] == tap else zero


def _planes(x: Any, first: Any, count: Any, weights: Any, out: Any) -> tuple[int, int]:
    return out.shape[0] * out.shape[1], out.size + x.size


@divided("void(R[:, :, ::1], I[::1], I[::1], R[:, ::1], T[:, :, ::1])", _planes)
def resample(
    x: Any, first: Any, count: Any, weights: Any, out: Any, low: int, high: int
) -> None:  # fmt: skip
    """out[a, j] = sum over k < count[j] of weights[j, k] x[a, first[j] + k]; x (A, n, B)."""
    for line in range(low, high):
        a, j = line // out.shape[1], line % out.shape[1]
        total = out[a, j]
        total[:] = out.dtype.type(0)
        for k in range(count[j]):
            row, weight = x[a, first[j] + k], weights[j, k]
            for i in range(total.size):
                total[i] += weight * row[i]
