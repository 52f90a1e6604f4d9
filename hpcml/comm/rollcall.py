"""The roll-call: which rank is where, and who is missing from a call. Standard library only."""

from __future__ import annotations

import os

from hpcml.comm.sheet import FAILED, LEFT, Call, Position, ranks_of, spell

_UNEVEN = ("gather", "scatter", "alltoall")
"""Operations whose counts may differ by rank."""
_STATES = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead", "X": "dead"}


def roll_call(positions: list[Position], now: float, dead: tuple[int, ...] | None = None) -> str:
    """A line for each rank: process, host, and what it does since when.

    `dead`: ranks known to be gone, where the others may be so too by now, for other reasons.
    """
    lines = []
    for position in positions:
        if dead is None:
            process = process_state(position.pid)
        else:
            process = "gone" if position.rank in dead else ""
        who = f"  rank {position.rank} (pid {position.pid}, {position.host}): "
        lines.append(who + _listed(process, doing(position, now)))
    return "\n".join(lines)


def doing(position: Position, now: float) -> str:
    """What a rank does, and since when."""
    inside = position.inside
    if inside:
        return "; ".join(f"{now - call.since:.1f} s in {call}" for call in inside)
    last = position.last
    before = f"last call {last}" if last else "no call yet"
    if position.state == LEFT:
        return f"at the end of its program, {before}"
    if position.state == FAILED:
        return f"ended by an error, {before}"
    since = now - (last.since if last else position.since)
    where = f" at {position.line}" if position.line else ""
    return f"computing for {since:.1f} s{where}, {before}"


def conclusion(rank: int, call: Call, positions: list[Position], now: float) -> str:
    """What the wait of this rank in this call is about: who is missing, or what does not fit."""
    known = {position.rank: position for position in positions}
    others = [member for member in ranks_of(call.members) if member != rank]
    meetings = {other: _meeting(known[other], call) for other in others if other in known}
    ahead = [other for other in meetings if _beyond(known[other], call)]
    lines = []
    for other, met in meetings.items():
        state = process_state(known[other].pid)
        if met is None and other not in ahead:
            lines.append(f"missing: rank {other}, {_listed(state, doing(known[other], now))}")
        elif state:
            lines.append(f"rank {other} has come, but is {state}")
    absent = [other for other in others if other not in known]
    if absent:
        lines.append(f"on other nodes, of which this one knows nothing: {_ranks(absent)}")
    if ahead:
        lines.append(f"through with call #{call.sequence} of this axis already: {_ranks(ahead)}")
    lines += _differences({**meetings, rank: call})
    if ahead or not lines:
        lines.append("to see whether all call the same, run with HPCML_DEBUG=comm")
    return "\n".join(lines)


def process_state(pid: int) -> str:
    """What is wrong with a process: stopped, dead, gone; empty if nothing is, or none can tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return _STATES.get(file.read().rpartition(")")[2].split()[0], "")
    except (OSError, IndexError):
        return "gone" if os.path.isdir("/proc/self") else ""


def _meeting(position: Position, call: Call) -> Call | None:
    """The rank's part in this call, if it has come to it."""
    for own in position.inside:
        if (own.axis, own.members, own.sequence) == (call.axis, call.members, call.sequence):
            return own if call.sequence else None
    return None


def _beyond(position: Position, call: Call) -> bool:
    """Whether the rank has come back from its part in this call already."""
    return call.sequence > 0 and any(
        (own.axis, own.members) == (call.axis, call.members)
        and own.sequence + (not own.inside) > call.sequence
        for own in position.calls
    )


def _differences(meetings: dict[int, Call | None]) -> list[str]:
    """A line on ranks that have come to the same call with other operations, types or counts."""
    kinds: dict[tuple[str, int, str], list[int]] = {}
    for rank, call in sorted(meetings.items()):
        if call is not None:
            count = 0 if call.operation in _UNEVEN else call.elements
            kinds.setdefault((call.operation, count, call.dtype), []).append(rank)
    said = [
        f"{_ranks(ranks)} {operation} of {count or 'some'} {dtype}"
        for (operation, count, dtype), ranks in kinds.items()
    ]
    return ["not the same call: " + "; ".join(said)] if len(said) > 1 else []


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {spell(tuple(ranks))}"
