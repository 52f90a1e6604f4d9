"""Collectives on ordinary memory by way of memory that several ranks of a node share.

A chunk at a time: each rank copies what others need to its row of the shared matrix, all meet, and
each reads from the rows. The two halves of the matrix take turns: a rank that writes to a half has
met the others since they read from it, at the meeting of the other half. Sums run over the ranks in
their order.

Arguments that kernels have in common: `flags`, `ranks`, `rank`, `spins` and `yields` are those of
`shared.meet`; the first meeting has `value`, each further one has one more. `half` (0 or 1) is the
half of `rows` for the first chunk, of `room` columns. `onto`: add to what `out` holds.

All return -1 at the end. A rank that is late is told by its number, plus `ranks` for each meeting
before the one to which it has not come: call again to go on waiting, with `done` = 1 more than
those meetings. 0: to begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.kernels.cpu.jit import inline, kernel
from hpcml.kernels.cpu.shared import LANES, TILE, copy, meet


@inline
def _sum(rows: Any, rank: int, first: int, own: Any, out: Any, onto: bool) -> None:
    """Sum `own` of this rank and the columns from `first` on of the others, in their order."""
    tile = np.empty(TILE, rows.dtype)
    for start in range(0, out.size, TILE):
        here = out[start : start + TILE]
        n = here.size
        if onto:
            copy(here, tile)
        for k in range(rows.shape[0]):
            fresh = k == 0 and not onto
            if k == rank:
                _add(own[start : start + n], tile, fresh)
            else:
                _add(rows[k, first + start : first + start + n], tile, fresh)
        copy(tile[:n], here)


@inline
def _add(row: Any, tile: Any, fresh: bool) -> None:
    if fresh:
        copy(row, tile)
    else:
        for j in range(row.size):
            tile[j] += row[j]


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64,"
    "T[:, ::1], int64, int64, R[::1], T[::1], boolean, boolean)"
)
def sum_by_way(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int, done: int,
    rows: Any, half: int, room: int, x: Any, out: Any, whole: bool, onto: bool,
) -> Any:  # fmt: skip
    """Sum the arrays `x` of all ranks into the `out` of each; `x` may be `out`.

    If `whole` each sums all of a chunk; otherwise a slice of whole tiles, which the others fetch
    when they have met once more.
    """
    meetings = 1 if whole else 2
    turn = (done - 1) // meetings if done else 0
    for start in range(turn * room, out.size, room):
        ours, part = x[start : start + room], out[start : start + room]
        n, first, before = part.size, ((half + turn) & 1) * room, turn * meetings
        step = n if whole else -(-n // (ranks * LANES)) * LANES
        low = 0 if whole else min(rank * step, n)
        high = min(low + step, n)
        if done <= before:
            copy(ours, rows[rank, first : first + n])
        if done <= before + 1:
            late = meet(flags, ranks, rank, value + before, spins, yields)
            if late != -1:
                return ranks * before + late
            _sum(rows, rank, first + low, ours[low:high], part[low:high], onto)
        if not whole:
            if done <= before + 1:
                copy(part[low:high], rows[rank, first + low : first + high])
            late = meet(flags, ranks, rank, value + before + 1, spins, yields)
            if late != -1:
                return ranks * (before + 1) + late
            for shift in range(1, ranks):
                other = (rank + shift) % ranks
                low = min(other * step, n)
                high = min(low + step, n)
                copy(rows[other, first + low : first + high], part[low:high])
        turn += 1
    return -1


@inline
def _longest(edges: Any) -> int:
    longest = 0
    for k in range(edges.size - 1):
        longest = max(longest, edges[k + 1] - edges[k])
    return longest


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64,"
    "T[:, ::1], int64, int64, int64[::1], R[::1], T[::1], boolean)"
)
def scatter_by_way(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int, done: int,
    rows: Any, half: int, room: int, edges: Any, x: Any, out: Any, onto: bool,
) -> Any:  # fmt: skip
    """Sum the arrays `x` of all ranks, of which rank k gets elements `edges[k]` to `edges[k + 1]`.

    `out` may be this rank's part of `x`. In a turn every block has its share of the columns, and
    nobody copies what only this rank needs.
    """
    share, turn = room // ranks, max(done - 1, 0)
    for start in range(turn * share, _longest(edges), share):
        first = ((half + turn) & 1) * room
        if done <= turn:
            for shift in range(1, ranks):  # not all to the same rank at once
                to = (rank + shift) % ranks
                low = min(edges[to] + start, edges[to + 1])
                theirs = x[low : min(low + share, edges[to + 1])]
                copy(theirs, rows[rank, first + to * share : first + to * share + theirs.size])
        late = meet(flags, ranks, rank, value + turn, spins, yields)
        if late != -1:
            return ranks * turn + late
        low = min(edges[rank] + start, edges[rank + 1])
        ours = x[low : min(low + share, edges[rank + 1])]
        column = first + rank * share
        _sum(rows, rank, column, ours, out[start : start + ours.size], onto)
        turn += 1
    return -1


@kernel(
    "int64(int64[::1], int64, int64, int64, int64, int64, int64,"
    "T[:, ::1], int64, int64, int64[::1], R[::1], T[::1])"
)
def gather_by_way(
    flags: Any, ranks: int, rank: int, value: int, spins: int, yields: int, done: int,
    rows: Any, half: int, room: int, edges: Any, x: Any, out: Any,
) -> Any:  # fmt: skip
    """Copy the arrays `x` of all ranks to `out`, that of rank k to `edges[k]` to `edges[k + 1]`.

    This rank's may lie there already.
    """
    turn = max(done - 1, 0)
    for start in range(turn * room, _longest(edges), room):
        first = ((half + turn) & 1) * room
        ours = x[start : start + room]
        if done <= turn:
            copy(ours, rows[rank, first : first + ours.size])
        late = meet(flags, ranks, rank, value + turn, spins, yields)
        if late != -1:
            return ranks * turn + late
        for shift in range(1, ranks):
            other = (rank + shift) % ranks
            low = min(edges[other] + start, edges[other + 1])
            theirs = out[low : min(low + room, edges[other + 1])]
            copy(rows[other, first : first + theirs.size], theirs)
        mine = out[edges[rank] + start : edges[rank] + start + ours.size]
        if mine.ctypes.data != ours.ctypes.data:
            copy(ours, mine)
        turn += 1
    return -1
