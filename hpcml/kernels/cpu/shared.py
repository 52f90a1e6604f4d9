"""Memory that several ranks of a node share: where they meet, and sums of what they wrote there.

A matrix `rows` holds the same piece of every rank's memory, row k that of rank k. Sums run over the
rows in their order, so their bits do not depend on who computes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from hpcml.kernels.cpu.atomics import load, relax, sched_yield, store
from hpcml.kernels.cpu.halves import narrow_all, round_to_half, widen_add, widen_all
from hpcml.kernels.cpu.jit import inline, kernel

FLAGS = 16
"""int64 that each rank has for its flag: two cache lines, because CPUs fetch them in pairs."""
LANES = 64
"""Elements of which slices are multiples: no two ranks write to one cache line."""
TILE = 2048
"""Elements summed at once: a tile stays in the first cache."""

# The C library's knows how to write whole cache lines without reading them first.
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


@inline
def _wait(flags: Any, ranks: int, value: int, spins: int, yields: int) -> Any:
    looks = 0
    for other in range(ranks):
        while load(flags, other * FLAGS) < value:
            looks += 1
            if looks <= spins:
                relax()
            elif looks <= spins + yields:
                sched_yield()
            else:
                return other
    return -1


@kernel("int64(int64[::1], int64, int64, int64, int64, int64)")
def meet(flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int) -> Any:
    """Set this rank's flag to `value` and wait until no rank's flag is below it.

    Each rank has `FLAGS` int64, of which the first is its flag. Looks `spins` times in a loop, then
    `yields` times with the CPU offered to others in between. Returns -1 when all have come, else
    the first rank that has not; call again to go on waiting.
    """
    store(flags, rank * FLAGS, value)
    return _wait(flags, ranks, value, spins, yields)


@kernel("int64(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def begin(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int,
    place: int, column: int, count: int, code: int,
) -> Any:  # fmt: skip
    """As `meet`, with four numbers that must be the same for all ranks; -2 if they are not.

    The ranks must meet once more before the next `begin`, which overwrites the numbers.
    """
    mine = rank * FLAGS
    flags[mine + 1], flags[mine + 2] = place, column
    flags[mine + 3], flags[mine + 4] = count, code
    store(flags, mine, value)
    late = _wait(flags, ranks, value, spins, yields)
    if late >= 0:
        return late
    for other in range(0, ranks * FLAGS, FLAGS):
        for k in range(1, 5):
            if flags[other + k] != flags[mine + k]:
                return -2
    return -1


@inline
def copy(x: Any, out: Any) -> None:
    """Copy elements."""
    for j in range(x.size):
        out[j] = x[j]


@inline
def _add_rows(rows: Any, start: int, stop: int, tile: Any, fresh: bool) -> None:
    """Sum columns start to stop into the tile, after what is in it unless `fresh`."""
    n = stop - start
    first = 0
    if fresh:
        one = rows[0, start:stop]
        two = rows[1, start:stop]
        for j in range(n):
            tile[j] = one[j] + two[j]
        first = 2
    for k in range(first, rows.shape[0]):
        row = rows[k, start:stop]
        for j in range(n):
            tile[j] += row[j]


@kernel("void(T[:, ::1], T[:, ::1], int64, int64, int64, int64, boolean)")
def sum_rows(
    rows: Any, results: Any, own: int, first: int, last: int, shift: int, onto: bool
) -> None:
    """Sum columns `first` to `last` of two or more rows into columns of every row of `results`.

    Column c goes to column c - `shift`. `results` may be `rows`. `onto`: add to what `results`
    holds in row `own`, which is the caller's, first of all.
    """
    tile = np.empty(TILE, rows.dtype)
    for start in range(first, last, TILE):
        stop = min(start + TILE, last)
        n, place = stop - start, start - shift
        if onto:
            mine = results[own, place : place + n]
            for j in range(n):
                tile[j] = mine[j]
        _add_rows(rows, start, stop, tile, not onto)
        for k in range(results.shape[0]):
            row = results[k, place : place + n]
            for j in range(n):
                row[j] = tile[j]


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean,"
    "T[:, ::1], T[:, ::1], int64, int64, int64, int64, boolean)"
)
def sum_together(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int,
    place: int, column: int, count: int, code: int, summed: bool,
    rows: Any, results: Any, own: int, first: int, last: int, shift: int, onto: bool,
) -> Any:  # fmt: skip
    """`begin`, `sum_rows` and `meet` with `value` + 1, in one call.

    Returns -1 at the end, -2 if the ranks call different things, else `late` if rank `late` has not
    come to the beginning or `ranks` + `late` if it has not come to the end: call again to go on
    waiting, with `summed` in the second case.
    """
    if not summed:
        late = begin(flags, ranks, rank, value, spins, yields, place, column, count, code)
        if late != -1:
            return late
        sum_rows(rows, results, own, first, last, shift, onto)
    late = meet(flags, ranks, rank, value + 1, spins, yields)
    return late if late == -1 else ranks + late


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean,"
    "uint8[:, ::1], int64, B[::1], boolean)"
)
def store_together(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int,
    place: int, column: int, count: int, code: int, stored: bool,
    rows: Any, first: int, x: Any, home: bool,
) -> Any:  # fmt: skip
    """`begin`, storing the bytes `x` into every row from column `first` on, and `meet`.

    The second meeting has `value` + 1. One's own row is left out if `x` is at `home` there. Stored
    by their owner, the bytes change hands once; fetched by the others they would do so twice.
    Returns as `sum_together` does.
    """
    if not stored:
        late = begin(flags, ranks, rank, value, spins, yields, place, column, count, code)
        if late != -1:
            return late
        for shift in range(1 if home else 0, ranks):  # not all to the same rank at once
            to = rows[(rank + shift) % ranks, first : first + x.size]
            _memcpy(to.ctypes.data, x.ctypes.data, x.size)
    late = meet(flags, ranks, rank, value + 1, spins, yields)
    return late if late == -1 else ranks + late


@kernel(
    "void(uint16[:, ::1], uint16[:, ::1], int64, int64, int64, int64, boolean, boolean, boolean)"
)
def sum_half_rows(
    rows: Any, results: Any, rank: int, first: int, last: int, shift: int, onto: bool,
    brain: bool, stepwise: bool,
) -> None:  # fmt: skip
    """As `sum_rows` for 16-bit floats, in float32, rounded once or (`stepwise`) at each addition.

    `brain`: they are bfloat16, else float16.
    """
    tile = np.empty(TILE, np.float32)
    words = np.empty(TILE, np.uint16)
    for start in range(first, last, TILE):
        stop = min(start + TILE, last)
        n, place = stop - start, start - shift
        if onto:
            widen_all(results[rank, place : place + n], tile, brain)
        else:
            widen_all(rows[0, start:stop], tile, brain)
        for k in range(0 if onto else 1, rows.shape[0]):
            widen_add(rows[k, start:stop], tile, brain)
            if stepwise:
                round_to_half(tile, n, brain)
        narrow_all(tile, words[:n], brain)
        for k in range(results.shape[0]):
            row = results[k, place : place + n]
            for j in range(n):
                row[j] = words[j]


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean,"
    "uint16[:, ::1], uint16[:, ::1], int64, int64, int64, int64, boolean, boolean, boolean)"
)
def sum_half_together(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int,
    place: int, column: int, count: int, code: int, summed: bool,
    rows: Any, results: Any, own: int, first: int, last: int, shift: int, onto: bool,
    brain: bool, stepwise: bool,
) -> Any:  # fmt: skip
    """`sum_together` with `sum_half_rows` between the meetings."""
    if not summed:
        late = begin(flags, ranks, rank, value, spins, yields, place, column, count, code)
        if late != -1:
            return late
        sum_half_rows(rows, results, own, first, last, shift, onto, brain, stepwise)
    late = meet(flags, ranks, rank, value + 1, spins, yields)
    return late if late == -1 else ranks + late
