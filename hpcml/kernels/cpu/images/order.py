"""Numbers put in another order, a square that fills the registers at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.images import moves
from hpcml.kernels.cpu.images.patches import address, keep
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
    from_, to, zeros, rows, columns = (
        address(weight), address(panel), address(nothing), address(sources), address(targets)
    )  # fmt: skip
    whole = numbers // lanes * lanes
    for column in range(0, width, lanes):
        for k in range(0, whole, lanes):
            for j in range(lanes):
                place = (first + column + j) * numbers + k
                inside = column + j < count
                sources[j] = from_ + place * size if inside else zeros
                row = (k + j) % taps * run + (k + j) // taps
                targets[j] = to + (row * width + column) * size
            moves.transpose(zero, rows, columns)
        for k in range(whole, numbers):
            row = k % taps * run + k // taps
            for j in range(lanes):
                inside = column + j < count
                value = flat[(first + column + j) * numbers + k] if inside else zero
                panel[row * width + column + j] = value
    keep(nothing), keep(sources), keep(targets)


@inline
def pack_channels(
    weight: Any, low: int, high: int, first: int, count: int, width: int, taps: Any, panel: Any
) -> None:  # fmt: skip
    """panel[t, i, j] = weight[low + i, first + j, taps[t, 3]] for j < count, else 0."""
    size, (_, inner, in_all), run = weight.itemsize, weight.shape, high - low
    lanes, from_, to = BYTES // size, address(weight), address(panel)
    if in_all == 1 and count == width and taps.shape[0] == 1:
        for i in range(run):
            source = from_ + ((low + i) * inner + first) * size
            moves.copy(weight.dtype.type(0), width, source, to + i * width * size)
        return
    if in_all == 1 or count < width:
        _pack_some(weight, low, run, first, count, width, taps, panel)
        return
    where = np.full(in_all, -1, np.int64)  # of each tap of the filter, its place among `taps`
    for t in range(taps.shape[0]):
        where[taps[t, 3]] = t
    unwanted, end = np.empty(lanes, weight.dtype), weight.size - lanes
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    waste, rows, columns = address(unwanted), address(sources), address(targets)
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
                    sources[j] = from_ + (start + j * in_all + tap) * size
                    targets[j] = waste
                    if tap + j < in_all and where[tap + j] >= 0:
                        row = where[tap + j] * run + i
                        targets[j] = to + (row * width + column) * size
                moves.transpose(weight.dtype.type(0), rows, columns)
    keep(unwanted), keep(sources), keep(targets)


@inline
def _pack_some(
    weight: Any, low: int, run: int, first: int, count: int, width: int, taps: Any, panel: Any
) -> None:  # fmt: skip
    """The same, one number after the other."""
    panel[: taps.shape[0] * run * width] = weight.dtype.type(0)
    for i in range(run):
        for t in range(taps.shape[0]):
            for j in range(count):
                panel[(t * run + i) * width + j] = weight[low + i, first + j, taps[t, 3]]


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
    from_, to, waste = address(sums), address(out), address(unwanted)
    into, outof = address(targets), address(sources)
    whole = numbers // lanes * lanes
    while low < high:
        group, column = low // columns, low % columns
        start = min(column, sums.shape[2] - lanes)
        few = min(lanes - (column - start), columns - column, high - low)
        for k in range(0, whole, lanes):
            for j in range(lanes):
                row = (k + j) % taps * run + (k + j) // taps
                line = group * sums.shape[1] + row
                sources[j] = from_ + (line * sums.shape[2] + start) * size
                wanted = column - start <= j < column - start + few
                place = (group * columns + start + j) * numbers + k
                targets[j] = to + place * size if wanted else waste
            moves.transpose(zero, outof, into)
        for k in range(whole, numbers):
            for j in range(few):
                value = sums[group, k % taps * run + k // taps, column + j]
                flat[(low + j) * numbers + k] = value
        low += few
    keep(unwanted), keep(sources), keep(targets)


def _columns(x: Any, out: Any) -> tuple[int, int]:
    return x.shape[0] * x.shape[2], x.size


@divided("void(R[:, :, ::1], T[:, :, ::1])", _columns)
def transpose(x: Any, out: Any, low: int, high: int) -> None:
    """out[n, j, i] = x[n, i, j]."""
    zero, size = x.dtype.type(0), x.itemsize
    lanes, (_, m, columns) = BYTES // size, x.shape
    sources, targets = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    from_, to, rows, into = address(x), address(out), address(sources), address(targets)
    while low < high:
        n, column = low // columns, low % columns
        few = min(lanes, columns - column, high - low)
        whole = m // lanes * lanes if few == lanes else 0
        for i in range(0, whole, lanes):
            for j in range(lanes):
                sources[j] = from_ + ((n * m + i + j) * columns + column) * size
                targets[j] = to + ((n * columns + column + j) * m + i) * size
            moves.transpose(zero, rows, into)
        for j in range(column, column + few):
            for i in range(whole, m):
                out[n, j, i] = x[n, i, j]
        low += few
    keep(sources), keep(targets)
