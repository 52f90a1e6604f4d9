"""A pipeline's step beside what its schedule makes of the same stage times without losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from hpcml.parallel.pipeline import (
    Action,
    Costs,
    Kind,
    ScheduleError,
    Simulation,
    simulate,
    table,
)
from hpcml.parallel.pipeline.actions import COMPUTE, RECEIVES, SENDS
from hpcml.trace.record import Recorded
from hpcml.trace.segments import is_wait, with_calls

_RECEIVED_BY = {Kind.FORWARD: Kind.RECV_F, Kind.BACKWARD: Kind.RECV_B, Kind.INPUT: Kind.RECV_B}


@dataclass(frozen=True)
class Theory:
    """What the ranks of a pipeline did beside a simulation of it; seconds."""

    ranks: Sequence[Recorded]
    """In the order of the stages."""
    start: float
    """When the first of them began to compute."""
    makespan: float
    """From there to the end of the last action. The update, of all together, is none of them."""
    busy: Sequence[float]
    """Of each rank in that time: what it neither waited for messages nor sent or received."""
    costs: Costs
    """Of the actions of a stage the mean, less waits; of messages one time for all."""
    simulation: Simulation
    """The same actions in the same orders with these costs."""

    @property
    def bubble(self) -> float:
        """The share of the time of all ranks in which they were not busy."""
        return 1 - sum(self.busy) / len(self.busy) / self.makespan

    @property
    def ratio(self) -> float:
        """The makespan in that of the simulation."""
        return self.makespan / self.simulation.makespan


class Done(NamedTuple):
    """An action as a rank has carried it out."""

    action: Action
    asked: float
    """When it began, with a wait if there was one."""
    start: float
    """When there was nothing to wait for any more."""
    end: float
    seconds: float
    """Between both, less waits."""


def theories(ranks: Sequence[Recorded]) -> list[Theory]:
    """Of each pipeline, the ranks that differ along the axis "pp" alone; none without that axis.

    Nor of one that is not empty when the step begins and ends: its actions are no whole table.
    """
    lines: defaultdict[tuple[tuple[str, int], ...], list[Recorded]] = defaultdict(list)
    for rank in ranks:
        lines[tuple((axis, at) for axis, at in rank.coords.items() if axis != "pp")].append(rank)
    found = []
    for line in lines.values():
        if len(line) > 1:
            with suppress(ScheduleError):
                found.append(theory(sorted(line, key=lambda rank: rank.coords["pp"])))
    return found


def theory(ranks: Sequence[Recorded]) -> Theory:
    """Compare what the ranks of a pipeline, in the order of the stages, did with a simulation."""
    done = [actions(rank) for rank in ranks]
    found = costs(done)
    lowered = table("as recorded", ([one.action for one in own] for own in done))
    simulation = simulate(lowered, found)
    busy = [sum(o.seconds for o in own if o.action.kind not in (*SENDS, *RECEIVES)) for own in done]
    start = min(one.start for own in done for one in own if one.action.kind in COMPUTE)
    end = max(own[-1].end for own in done)
    return Theory(ranks, start, end - start, busy, found, simulation)


def actions(rank: Recorded) -> list[Done]:
    """The actions of a schedule that a rank carried out, in their order."""
    found = []
    for work, calls in with_calls(rank):
        if work.stage < 0:
            continue
        waits = [call for call in calls if is_wait(call)]
        start = waits[-1].end if waits else work.start
        seconds = work.end - work.start - sum(wait.end - wait.start for wait in waits)
        action = Action(work.stage, Kind(work.kind), work.microbatch)
        found.append(Done(action, work.start, start, work.end, seconds))
    return found


def costs(done: Sequence[Sequence[Done]]) -> Costs:
    """What actions took, by rank: means by stage and kind, and of messages one time for all."""
    times: defaultdict[tuple[int, Kind], list[float]] = defaultdict(list)
    for one in (one for own in done for one in own):
        if one.action.kind not in (*SENDS, *RECEIVES):
            times[one.action.stage, one.action.kind].append(one.seconds)
    return Costs(
        dict.fromkeys(SENDS, message_time(done)),
        {place: fmean(seconds) for place, seconds in times.items()},
    )


def message_time(done: Sequence[Sequence[Done]]) -> float:
    """The median time of a message for which its receiver was waiting when it was sent; 0 of none.

    When others have come, the receiver's timeline does not tell.
    """
    every: dict[Action | None, Done] = {one.action: one for own in done for one in own}
    times = []
    for action, asked, start, *_ in every.values():
        sent = every.get(sender(action))
        if sent and asked <= sent.asked < start:
            times.append(start - sent.asked)
    return median(times) if times else 0.0


def sender(action: Action) -> Action | None:
    """The send that an action needs, if its stage has a neighbour on another rank there."""
    kind = _RECEIVED_BY.get(action.kind)
    return action._replace(kind=kind).partner if kind else None
