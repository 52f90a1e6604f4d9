"""Timelines made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hpcml.comm.timeline import Call, Work
from hpcml.trace.record import Recorded


def recorded(
    rank: int,
    coords: Mapping[str, int],
    work: Iterable[tuple[str, float, float]] = (),
    calls: Sequence[Call] = (),
    span: tuple[float, float] = (0.0, 100.0),
) -> Recorded:
    """A rank whose pieces of work are written as in schedules, `1F0`, or as a kind alone."""
    return Recorded(rank, coords, *span, [_work(*one) for one in work], calls)


def wait(start: float, end: float, operation: str = "recv") -> Call:
    """A wait for a message."""
    return Call(operation, "pp", 8, False, start, end)


def _work(name: str, start: float, end: float) -> Work:
    if not name[0].isdigit():
        return Work(name, -1, -1, start, end)
    kind = name.strip("0123456789")
    stage, _, microbatch = name.partition(kind)
    return Work(kind, int(stage), int(microbatch), start, end)
