"""Run a lowered schedule without models or MPI: times, idleness, memory, versions of weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from hpcml.errors import UserError
from hpcml.parallel.pipeline.actions import (
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
)
from hpcml.parallel.pipeline.costs import Costs
from hpcml.parallel.pipeline.execute import Event, Wires, execute
from hpcml.parallel.pipeline.versions import held, staleness

MESSAGES = (*SENDS, *RECEIVES)


@dataclass(frozen=True)
class Simulation:
    """What a schedule does with given costs, in their unit of time."""

    schedule: Schedule
    """The lowered one."""
    events: tuple[tuple[Event, ...], ...]
    """For each rank its actions with start and end."""
    makespan: float
    busy: tuple[float, ...]
    """For each rank the time in which it does not wait, neither for others nor for messages."""
    peaks: tuple[int, ...]
    """For each rank the most activations that it keeps at once, in microbatches of a stage."""
    versions: tuple[int, ...]
    """For each stage the most versions of its weights that it keeps at once."""
    staleness: tuple[int, ...]
    """For each stage how many updates old its gradients are at most."""

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank the share of the makespan in which it waits."""
        return tuple(1 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The idle share of the time of all ranks, as GPipe counts it: (K - 1) / (M + K - 1)."""
        return sum(self.idle) / len(self.idle)

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time by busy time, as Megatron-LM counts it: (p - 1) / m."""
        busy = sum(self.busy)
        return len(self.busy) * self.makespan / busy - 1 if busy else 0.0


def simulate(
    schedule: Schedule, costs: Costs | None = None, *, synchronous: bool = False
) -> Simulation:
    """Execute a lowered schedule.

    synchronous: a send waits for its receive; otherwise it ends at once, and compute waits for what
    it needs alone. A schedule that ends with synchronous sends ends on any machine.

    Raises ScheduleError if ranks wait for ever (naming all of them), if a message is not received
    or not in the order of the sends, or if activations are released other than once.
    """
    costs = Costs() if costs is None else costs
    for stage, kind in costs.stages:
        if stage >= schedule.stages:
            last = schedule.stages - 1
            raise UserError(f"cost of {stage}{kind}: {schedule.name} has stages 0 to {last}")
    _paired(schedule)
    wires = Wires.SYNCHRONOUS if synchronous else Wires.BUFFERED
    events = execute(schedule, costs, wires)
    late = staleness(schedule)
    return Simulation(
        schedule=schedule,
        events=tuple(map(tuple, events)),
        makespan=max(event.end for rank in events for event in rank),
        busy=tuple(_busy(rank) for rank in events),
        peaks=tuple(_peak(schedule, rank) for rank in range(schedule.ranks)),
        versions=held(schedule),
        staleness=tuple(
            max((n for (at, _), n in late.items() if at == stage), default=0)
            for stage in range(schedule.stages)
        ),
    )


def _busy(events: list[Event]) -> float:
    return sum(end - start for action, start, end in events if action.kind not in MESSAGES)


def _paired(schedule: Schedule) -> None:
    """What a rank sends another is received once, and in that order: messages need no numbers."""
    sent, received = _messages(schedule, SENDS), _messages(schedule, RECEIVES)
    for way in sorted({*sent, *received}):
        for send, receive in zip_longest(sent[way], received[way]):
            if send and receive and send.action.partner == receive.action:
                continue
            rank, cell, action = receive or send
            there = f"{send.action} is next" if send and receive else f"no {action.partner}"
            raise ScheduleError(
                f"{schedule.name}: rank {rank}, cell {cell + 1} ({action}): from rank {way[0]} to "
                f"{way[1]} {there}: give each send one receive, in the same order",
                [(rank, cell)],
            )


class _Message(NamedTuple):
    """One end of a message and where it is."""

    rank: int
    cell: int
    action: Action


def _messages(
    schedule: Schedule, kinds: tuple[Kind, ...]
) -> defaultdict[tuple[int, int], list[_Message]]:
    """The sends or the receives, by the ranks that they go from and to, in their order."""
    found: defaultdict[tuple[int, int], list[_Message]] = defaultdict(list)
    for rank, order in enumerate(schedule.orders):
        for cell, action in enumerate(order):
            if action.kind in kinds:
                peer = schedule.rank_of[action.partner.stage]
                way = (rank, peer) if action.kind in SENDS else (peer, rank)
                found[way].append(_Message(rank, cell, action))
    return found


def _peak(schedule: Schedule, rank: int) -> int:
    """The most forwards without their release, each of which comes once."""
    kept: set[tuple[int, int]] = set()
    peak = 0
    for cell, (stage, kind, microbatch) in enumerate(schedule.orders[rank]):
        if kind is Kind.FORWARD:
            kept.add((stage, microbatch))
            peak = max(peak, len(kept))
        elif kind is Kind.RELEASE:
            if (stage, microbatch) not in kept:
                raise ScheduleError(
                    f"{schedule.name}: rank {rank}, cell {cell + 1}: released twice: remove one",
                    [(rank, cell)],
                )
            kept.remove((stage, microbatch))
    if kept:
        stage, microbatch = min(kept)
        action = Action(stage, Kind.RELEASE, microbatch)
        end = len(schedule.orders[rank])
        raise ScheduleError(
            f"{schedule.name}: rank {rank}: {action} is missing: add it after the backward",
            absent=(rank, end, str(action)),
        )
    return peak
