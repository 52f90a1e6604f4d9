"""Schedules as grids of characters: ranks down; time, or of a broken one places, across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from hpcml.parallel.pipeline.actions import COMPUTE, Schedule, ScheduleError
from hpcml.parallel.pipeline.simulate import Simulation

COLUMNS = 400
"""At most so many columns: costs that differ much would make a grid without end."""
TICK = 5
"""Columns from one time in the heading to the next."""


def grid(simulation: Simulation) -> str:
    """A line a rank: what it computes when, `.` where it waits; a column is the shortest action.

    What takes no time, such as an update without a cost, is not drawn; nor are messages.
    """
    schedule = simulation.schedule
    drawn = [[e for e in events if e.action.kind in COMPUTE] for events in simulation.events]
    times = [e.end - e.start for events in drawn for e in events if e.end > e.start]
    unit = max(min(times, default=1.0), simulation.makespan / COLUMNS)
    rows = []
    for rank, events in enumerate(drawn):
        own = schedule.stages_of(rank)
        start = len(str(own[0])) if len(own) == 1 else 0  # a rank's only stage goes without saying
        labels = [str(event.action)[start:] for event in events]
        edges = [(_column(event.start, unit), _column(event.end, unit)) for event in events]
        rows.append(list(zip(labels, edges, strict=True)))
    width = 1 + max(len(label) for row in rows for label, _ in row)
    columns = _column(simulation.makespan, unit)
    ticks = (f"{tick * unit:g}".ljust(TICK * width) for tick in range(0, columns + 1, TICK))
    lines = (_bars(row, columns, width) for row in rows)
    return _rows([("time", "".join(ticks)), *_by_rank(lines)])


def broken(schedule: Schedule, error: ScheduleError) -> str:
    """A line a rank with its actions in order: wrong ones in brackets, `[?]` what is missing."""
    rows = []
    for rank, order in enumerate(schedule.orders):
        cells = [
            f"[{action}]" if (rank, cell) in error.cells else f" {action} "
            for cell, action in enumerate(order)
        ]
        if error.absent and error.absent[0] == rank:
            cells.insert(error.absent[1], f"[{error.absent[2]}?]")
        rows.append(cells)
    width = max((len(cell) for cells in rows for cell in cells), default=0)
    return _rows(_by_rank("".join(cell.ljust(width) for cell in cells) for cells in rows))


def _column(time: float, unit: float) -> int:
    return math.floor(time / unit + 0.5)


def _bars(row: list[tuple[str, tuple[int, int]]], columns: int, width: int) -> str:
    idle, line, now = ".".ljust(width), "", 0
    for label, (first, last) in row:
        if last > first:
            bar = label.ljust((last - first) * width - 1, "-")
            line, now = line + idle * (first - now) + bar + " ", last
    return line + idle * (columns - now)


def _by_rank(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((f"rank {rank}", line) for rank, line in enumerate(lines))


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    """Lines with their names before them."""
    known = list(rows)
    width = max(len(name) for name, _ in known) + 2
    return "\n".join((name.ljust(width) + line).rstrip() for name, line in known)
