"""The roll-call: which rank is where, and who is missing from a call. Standard library only."""

from __future__ import annotations

import os
import sys

from hpcml.comm.sheet import FAILED, LEFT, Call, Position, ranks_of, spell

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
        lines.append(who + ", ".join(filter(None, [process, doing(position, now)])))
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
    members = [member for member in ranks_of(call.members) if member != rank]
    if not call.sequence:
        return _peers(call, [known[peer] for peer in members if peer in known], now)
    there = {
        member: _meeting(known[member], call) for member in (rank, *members) if member in known
    }
    lines = []
    for member, met in there.items():
        if met is None and not _beyond(known[member], call):
            state = process_state(known[member].pid)
            where = ", ".join(filter(None, [state, doing(known[member], now)]))
            lines.append(f"missing: rank {member}, {where}")
    kinds: dict[tuple[str, int, str], list[int]] = {}
    for member, met in there.items():
        if met is not None:
            kinds.setdefault((met.operation, met.elements, met.dtype), []).append(member)
    if len(kinds) > 1:
        said = "; ".join(
            f"{_ranks(ranks)}: {operation} of {count} {dtype}"
            for (operation, count, dtype), ranks in kinds.items()
        )
        lines.append(f"the ranks do not call the same: {said}")
    absent = tuple(member for member in members if member not in known)
    if absent:
        lines.append(f"{_ranks(absent)} on other nodes, of which this one knows nothing")
    if not lines:
        lines.append(_all_there([known[member] for member in members]))
    return "\n".join(lines)


def process_state(pid: int) -> str:
    """What is wrong with a process: stopped, dead, gone; empty if nothing is."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                return _STATES.get(file.read().rpartition(")")[2].split()[0], "")
        except (OSError, IndexError):
            return "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return ""


def _meeting(position: Position, call: Call) -> Call | None:
    """The rank's part in this call, if it has come to it."""
    for own in position.inside:
        if (own.axis, own.members, own.sequence) == (call.axis, call.members, call.sequence):
            return own
    return None


def _beyond(position: Position, call: Call) -> bool:
    """Whether the rank has come back from this call already: its part in it was done."""
    return any(
        (own.axis, own.members) == (call.axis, call.members)
        and own.sequence + own.inside > call.sequence
        for own in position.calls
    )


def _peers(call: Call, peers: list[Position], now: float) -> str:
    return (
        "\n".join(
            f"not there: rank {peer.rank}, "
            + ", ".join(filter(None, [process_state(peer.pid), doing(peer, now)]))
            for peer in peers
        )
        or f"rank {call.members} is on another node"
    )


def _all_there(others: list[Position]) -> str:
    odd = [(other.rank, state) for other in others if (state := process_state(other.pid))]
    if odd:
        return "all have come, but " + ", ".join(f"rank {rank} is {state}" for rank, state in odd)
    return "all ranks have come to this call, and it does not come back"


def _ranks(ranks: list[int] | tuple[int, ...]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {spell(tuple(ranks))}"
