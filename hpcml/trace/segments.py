"""What each rank did at every moment of a step."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hpcml.comm.timeline import Call, Work
from hpcml.parallel.pipeline.actions import COMPUTE
from hpcml.trace.record import Recorded

TRANSFER, WAITING = "transfer", "waiting"
"""What is no compute: to send, reduce, gather; and only to wait for another rank."""
_WAITS = ("send", "recv", "barrier", "accumulate")


class Segment(NamedTuple):
    """A time in which a rank did one thing; between segments it is idle, as far as it noted."""

    what: str
    """A kind of compute, TRANSFER or WAITING."""
    stage: int
    """That of the work which it is a part of, and the microbatch; -1 of none."""
    microbatch: int
    start: float
    end: float


def segments(ranks: Sequence[Recorded]) -> list[list[Segment]]:
    """For each rank what it did, in the order of time; those of a rank do not overlap.

    Of a collective the time until the last rank comes is waiting, the rest transfer. Where a mesh's
    axis is cut (`Mesh.split`) all of it is transfer: who belongs together is not in a timeline.
    What communication threads do beside the work is not here.
    """
    met = _meetings(ranks)
    return [
        sorted((s for s in _cut(rank, met[rank.rank]) if s.end > s.start), key=lambda s: s.start)
        for rank in ranks
    ]


def with_calls(rank: Recorded) -> Iterator[tuple[Work, list[Call]]]:
    """Each piece of work with the calls that the rank has made within it."""
    calls = own_calls(rank)
    starts = [call.start for call in calls]
    for work in rank.work:
        yield work, calls[bisect_left(starts, work.start) : bisect_left(starts, work.end)]


def own_calls(rank: Recorded) -> list[Call]:
    """The calls that a rank has made itself, not its communication threads."""
    return [call for call in rank.calls if not call.background]


def is_wait(call: Call) -> bool:
    """Whether a call is nothing but a wait for another rank."""
    return call.operation in _WAITS


def _cut(rank: Recorded, met: Mapping[Call, float]) -> Iterator[Segment]:
    inside: set[Call] = set()

    def of_call(call: Call, stage: int = -1, microbatch: int = -1) -> Iterator[Segment]:
        ready = call.end if is_wait(call) else min(met.get(call, call.start), call.end)
        yield Segment(WAITING, stage, microbatch, call.start, ready)
        yield Segment(TRANSFER, stage, microbatch, ready, call.end)

    for work, calls in with_calls(rank):
        kind = work.kind if work.kind in COMPUTE else TRANSFER
        edge = work.start
        for call in calls:
            yield Segment(kind, work.stage, work.microbatch, edge, call.start)
            yield from of_call(call, work.stage, work.microbatch)
            edge = call.end
        yield Segment(kind, work.stage, work.microbatch, edge, work.end)
        inside.update(calls)
    for call in own_calls(rank):
        if call not in inside:
            yield from of_call(call)


def _meetings(ranks: Sequence[Recorded]) -> dict[int, dict[Call, float]]:
    """Of each rank, when the last of those that share it came to a collective.

    All ranks of an axis make the same collectives in the same order, so the n-th of each is one.
    """
    together: defaultdict[Any, list[tuple[int, Call]]] = defaultdict(list)
    for rank in ranks:
        counts: Counter[str] = Counter()
        for call in own_calls(rank):
            along = rank.coords if call.axis == "world" else call.axis.split("*")
            if is_wait(call) or not set(along) <= set(rank.coords):
                continue
            place = tuple(at for axis, at in rank.coords.items() if axis not in along)
            together[call.axis, place, counts[call.axis]].append((rank.rank, call))
            counts[call.axis] += 1
    met: dict[int, dict[Call, float]] = {rank.rank: {} for rank in ranks}
    for members in together.values():
        ready = max(call.start for _, call in members)
        for number, call in members:
            met[number][call] = ready
    return met
