"""Timelines of all ranks in the format of Chrome's tracing, which Perfetto reads as well.

The format is Google's "Trace Event Format". A rank is a process there, times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hpcml.parallel.pipeline.actions import COMPUTE, SENDS, Action
from hpcml.trace.record import Place, Recorded, Trace
from hpcml.trace.segments import TRANSFER, WAITING, is_wait
from hpcml.trace.theory import actions, sender

Event = dict[str, Any]

_ROWS = ("work", "background")
"""Of a rank: what it does itself, and what its communication threads do beside."""


def events(trace: Trace) -> dict[str, Any]:
    """All steps as one object, ready for JSON. Time 0 is when the first rank begins the first."""
    zero = min(rank.start for ranks in trace.steps.values() for rank in ranks)
    found = [event for rank, place in enumerate(trace.places) for event in _names(rank, place)]
    for number, ranks in trace.steps.items():
        for rank in ranks:
            found += _slices(number, rank, zero)
        found += _arrows(number, ranks, zero)
    return {"displayTimeUnit": "ms", "traceEvents": found}


def _names(rank: int, place: Place) -> Iterator[Event]:
    where = " ".join(f"{axis}={at}" for axis, at in place.coords.items())
    label = f"rank {rank} ({where}) on {place.host}, clock ± {place.uncertainty * 1e6:.1f} µs"
    yield _event("process_name", "M", rank, args={"name": label})
    yield _event("process_sort_index", "M", rank, args={"sort_index": rank})
    for row, name in enumerate(_ROWS):
        yield _event("thread_name", "M", rank, row, args={"name": name})


def _slices(number: int, rank: Recorded, zero: float) -> Iterator[Event]:
    def slice(name: str, kind: str, one: Any, row: int = 0, **args: Any) -> Event:
        times = {"ts": (one.start - zero) * 1e6, "dur": (one.end - one.start) * 1e6}
        return _event(name, "X", rank.rank, row, cat=kind, **times, args=args)

    yield slice(f"step {number}", "step", rank)
    for work in rank.work:
        kind = work.kind if work.kind in COMPUTE else TRANSFER
        label = f"{work.stage}{work.kind}{work.microbatch}" if work.stage >= 0 else work.kind
        yield slice(label, kind, work, stage=work.stage, microbatch=work.microbatch)
    for call in rank.calls:
        args = {"axis": call.axis, "bytes": call.bytes}
        kind = WAITING if is_wait(call) else TRANSFER
        yield slice(call.operation, kind, call, int(call.background), **args)


def _arrows(number: int, ranks: Sequence[Recorded], zero: float) -> Iterator[Event]:
    """From each message to the action that it was for, if both are in this step."""
    done = [(rank, one) for rank in ranks for one in actions(rank)]

    def name(rank: Recorded, send: Action | None) -> str:
        line = [str(at) for axis, at in rank.coords.items() if axis != "pp"]
        return ".".join([str(number), *line, str(send)])

    sent = {name(rank, one.action) for rank, one in done if one.action.kind in SENDS}
    both = sent & {name(rank, sender(one.action)) for rank, one in done}
    for rank, one in done:
        out = one.action.kind in SENDS
        id = name(rank, one.action if out else sender(one.action))
        if id in both:
            at = (one.start - zero) * 1e6
            way: Event = {"ph": "s"} if out else {"ph": "f", "bp": "e"}  # to the slice around it
            yield {"name": "message", "cat": TRANSFER, "id": id, "pid": rank.rank, "tid": 0,
                   "ts": at, **way}  # fmt: skip


def _event(name: str, phase: str, rank: int, row: int = 0, **more: Any) -> Event:
    return {"name": name, "ph": phase, "pid": rank, "tid": row, **more}
