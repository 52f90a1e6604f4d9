"""Numbers put in another order, a square that fills the registers at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import tiles
from hpcml.kernels.cpu.images.patches import address
from hpcml.kernels.cpu.images.tiles import BYTES
from hpcml.kernels.cpu.jit import inline
from hpcml.kernels.cpu.team import divided


@inline
def pack_filters(weight: Any, first: int, count: int, width: int, panel: Any) -> None:
    """panel[t, i, j] = weight[first + j, i, t] for j < count, else 0: rows of `width` filters."""
    zero, size = weight.dtype.type(0), weight.itemsize
    lanes, (_, run, taps) = BYTES // size, weight.shape
    numbers = run * taps
    nothing, flat = np.zeros(lanes, weight.dtype), weight.reshape(-1)
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    whole = numbers // lanes * lanes
    for column in range(0, width, lanes):
        for k in range(0, whole, lanes):
            for j in range(lanes):
                place = (first + column + j) * numbers + k
                inside = column + j < count
                sources[j] = address(weight) + place * size if inside else address(nothing)
                row = (k + j) % taps * run + (k + j) // taps
                targets[j] = address(panel) + (row * width + column) * size
            tiles.transpose(weight.dtype.type(0), address(sources), address(targets))
        for k in range(whole, numbers):
            row = k % taps * run + k // taps
            for j in range(lanes):
                inside = column + j < count
                value = flat[(first + column + j) * numbers + k] if inside else zero
                panel[row * width + column + j] = value


@inline
def pack_channels(
    weight: Any, low: int, high: int, first: int, count: int, width: int, taps: Any, panel: Any
) -> None:  # fmt: skip
    """panel[t, i, j] = weight[low + i, first + j, taps[t, 3]] for j < count, else 0."""
    size, (_, inner, in_all), run = weight.itemsize, weight.shape, high - low
    lanes = BYTES // size
    if in_all == 1 or count < width:
        panel[: taps.shape[0] * run * width] = weight.dtype.type(0)
        for i in range(run):
            for t in range(taps.shape[0]):
                source = weight[low + i, first : first + count, taps[t, 3]]
                target = panel[(t * run + i) * width : (t * run + i) * width + count]
                for j in range(count):
                    target[j] = source[j]
        return
    where = np.full(in_all, -1, np.int64)  # of each tap of the filter, its place among `taps`
    for t in range(taps.shape[0]):
        where[taps[t, 3]] = t
    unwanted, end = np.empty(lanes, weight.dtype), weight.size - lanes
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for i in range(run):
        for column in range(0, width, lanes):
            start = ((low + i) * inner + first + column) * in_all
            for tap in range(0, in_all, lanes):
                if start + (lanes - 1) * in_all + tap > end:  # a vector would reach beyond
                    for t in range(taps.shape[0]):
                        for j in range(lanes):
                            panel[(t * run + i) * width + column + j] = weight[
                                low + i, first + column + j, taps[t, 3]
                            ]
                    continue
                for j in range(lanes):
                    sources[j] = address(weight) + (start + j * in_all + tap) * size
                    targets[j] = address(unwanted)
                    if tap + j < in_all and where[tap + j] >= 0:
                        row = where[tap + j] * run + i
                        targets[j] = address(panel) + (row * width + column) * size
                tiles.transpose(weight.dtype.type(0), address(sources), address(targets))


def _filters(sums: Any, out: Any) -> tuple[int, int]:
    return out.shape[0], out.size


@divided("void(R[:, :, ::1], T[:, :, ::1])", _filters, ranges=1)
def order_sums(sums: Any, out: Any, low: int, high: int) -> None:
    """out[f, c, t] = sums[group, t * channels + c, f]: rows of sums may be longer than needed."""
    zero, size = out.dtype.type(0), out.itemsize
    lanes, (filters, run, taps) = BYTES // size, out.shape
    columns, numbers = filters // sums.shape[0], run * taps
    unwanted, flat = np.empty(lanes, out.dtype), out.reshape(-1)
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    whole = numbers // lanes * lanes
    while low < high:
        group, column = low // columns, low % columns
        start = min(column, sums.shape[2] - lanes)
        few = min(lanes - (column - start), columns - column, high - low)
        for k in range(0, whole, lanes):
            for j in range(lanes):
                row = (k + j) % taps * run + (k + j) // taps
                sources[j] = address(sums[group, row]) + start * size
                wanted = column - start <= j < column - start + few
                place = (group * columns + start + j) * numbers + k
                targets[j] = address(out) + place * size if wanted else address(unwanted)
            tiles.transpose(zero, address(sources), address(targets))
        for k in range(whole, numbers):
            for j in range(few):
                value = sums[group, k % taps * run + k // taps, column + j]
                flat[(low + j) * numbers + k] = value
        low += few


def _columns(x: Any, out: Any) -> tuple[int, int]:
    return x.shape[0] * x.shape[2], x.size


@divided("void(R[:, :, ::1], T[:, :, ::1])", _columns)
def transpose(x: Any, out: Any, low: int, high: int) -> None:
    """out[n, j, i] = x[n, i, j]."""
    zero, size = x.dtype.type(0), x.itemsize
    lanes, (_, m, columns) = BYTES // size, x.shape
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    while low < high:
        n, column = low // columns, low % columns
        few = min(lanes, columns - column, high - low)
        whole = m // lanes * lanes if few == lanes else 0
        for i in range(0, whole, lanes):
            for j in range(lanes):
                sources[j] = address(x) + ((n * m + i + j) * columns + column) * size
                targets[j] = address(out) + ((n * columns + column + j) * m + i) * size
            tiles.transpose(zero, address(sources), address(targets))
        for j in range(column, column + few):
            for i in range(whole, m):
                out[n, j, i] = x[n, i, j]
        low += few
