"""Programs of ranks run side by side: when each action starts and ends, or who waits for whom.

The programs name what they wait for, so what happens depends on neither chance nor costs: if they
end once, they always do. Costs only say when.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from hpcml.parallel.pipeline.actions import (
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
)
from hpcml.parallel.pipeline.costs import Costs


class Wires(Enum):
    """How results come from one rank to another."""

    NONE = "none"
    """At once and without sends or receives: for tables of compute actions."""
    BUFFERED = "buffered"
    """A send ends at once; a receive is open from its place on, and compute waits for what comes.
    What non-blocking messages can reach, and the standard choice of a simulation."""
    SYNCHRONOUS = "synchronous"
    """A send waits for its receive and both until the message is over: the least that MPI promises
    of a send, so programs that end with it end with any."""


class Event(NamedTuple):
    """When a rank ran an action. Of a buffered send: when the message was on its way."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Wait:
    """Where a rank cannot go on: the index in its order, the action there and what it needs."""

    rank: int
    cell: int
    action: Action
    needs: Action

    def __str__(self) -> str:
        return f"rank {self.rank} waits in cell {self.cell + 1} ({self.action}) for {self.needs}"


def needs(action: Action, stages: int) -> list[Action]:
    """The results that an action needs; `B` stands for the input's gradient, `W` the weights'."""
    stage, kind, m = action
    if kind is Kind.FORWARD:
        return [Action(stage - 1, Kind.FORWARD, m)] if stage > 0 else []
    if kind in (Kind.BACKWARD, Kind.INPUT):
        own = Action(stage, Kind.FORWARD, m)
        return [own, Action(stage + 1, Kind.BACKWARD, m)] if stage < stages - 1 else [own]
    if kind is Kind.WEIGHT:
        return [Action(stage, Kind.BACKWARD, m)]
    if kind in (Kind.UPDATE, Kind.REDUCE, Kind.RELEASE):
        return [Action(stage, Kind.WEIGHT, m)]
    return [carries(action)] if kind in SENDS else []


def gives(action: Action) -> list[Action]:
    """The results of an action, as `needs` names them."""
    stage, kind, m = action
    if kind is Kind.BACKWARD:
        return [action, Action(stage, Kind.WEIGHT, m)]
    if kind is Kind.INPUT:
        return [Action(stage, Kind.BACKWARD, m)]
    return [action] if kind in (Kind.FORWARD, Kind.WEIGHT) else []


def carries(send: Action) -> Action:
    """The result in a message."""
    kind = Kind.FORWARD if send.kind is Kind.SEND_F else Kind.BACKWARD
    return Action(send.stage, kind, send.microbatch)


def execute(
    schedule: Schedule, costs: Costs, wires: Wires, before: Iterable[Action] = ()
) -> list[list[Event]]:
    """The events of each rank. Raises ScheduleError that names where every rank waits.

    before: actions whose results are known at the start, everywhere; for tables without messages.
    """
    return _Machine(schedule, costs, wires, before).run()


class _Machine:
    def __init__(
        self, schedule: Schedule, costs: Costs, wires: Wires, before: Iterable[Action]
    ) -> None:
        self.schedule, self.costs, self.wires = schedule, costs, wires
        ranks = range(schedule.ranks)
        self.events: list[list[Event]] = [[] for _ in ranks]
        self.clock = [0.0] * schedule.ranks
        """When each rank is free."""
        everywhere = {result: 0.0 for action in before for result in gives(action)}
        self.known = [everywhere if wires is Wires.NONE else {} for _ in ranks]
        """When each rank has which results."""
        self.free: defaultdict[tuple[int, int], float] = defaultdict(float)
        """When the way from a rank to another is free."""
        self.opened: set[Action] = set()
        """Receives that are open before their message is sent."""
        self.arrivals: dict[Action, float] = {}
        """When messages come whose receives are not open yet."""

    def run(self) -> list[list[Event]]:
        ranks = range(self.schedule.ranks)
        while sum(self._advance(rank) for rank in ranks):
            pass
        waits = [wait for rank in ranks if (wait := self._wait(rank))]
        if waits:
            places = "; ".join(map(str, waits))
            cells = [(wait.rank, wait.cell) for wait in waits]
            raise ScheduleError(
                f"{self.schedule.name}: deadlock: {places}: change the order of one of them", cells
            )
        return self.events

    def _advance(self, rank: int) -> int:
        """Run what a rank can; how many actions that was."""
        before = len(self.events[rank])
        while self._wait(rank) is None and len(self.events[rank]) < self._length(rank):
            self._step(rank, self._current(rank))
        return len(self.events[rank]) - before

    def _length(self, rank: int) -> int:
        return len(self.schedule.orders[rank])

    def _current(self, rank: int) -> Action:
        return self.schedule.orders[rank][len(self.events[rank])]

    def _wait(self, rank: int) -> Wait | None:
        """What a rank waits for; None if it can go on or has ended."""
        cell = len(self.events[rank])
        if cell == self._length(rank):
            return None
        action = self._current(rank)
        missing = [n for n in needs(action, self.schedule.stages) if n not in self.known[rank]]
        if not missing and self.wires is Wires.SYNCHRONOUS:
            late = action.kind in SENDS and not self._receiver_ready(action)
            if late or action.kind in RECEIVES:  # which the send moves along
                missing = [action.partner]
        return Wait(rank, cell, action, missing[0]) if missing else None

    def _peer(self, message: Action) -> int:
        return self.schedule.rank_of[message.partner.stage]

    def _receiver_ready(self, send: Action) -> bool:
        peer = self._peer(send)
        ended = len(self.events[peer]) == self._length(peer)
        return not ended and self._current(peer) == send.partner

    def _step(self, rank: int, action: Action) -> None:
        if action.kind in SENDS:
            self._send(rank, action)
        elif action.kind in RECEIVES:
            self._open(rank, action)
        else:
            known = self.known[rank]
            ready = [known[need] for need in needs(action, self.schedule.stages)]
            start = max(self.clock[rank], *ready, 0.0)
            end = start + self.costs.of(action)
            self._record(rank, action, start, end)
            known.update(dict.fromkeys(gives(action), end))

    def _record(self, rank: int, action: Action, start: float, end: float) -> None:
        self.events[rank].append(Event(action, start, end))
        self.clock[rank] = end

    def _send(self, rank: int, send: Action) -> None:
        peer, receive, time = self._peer(send), send.partner, self.costs.of(send)
        if self.wires is Wires.SYNCHRONOUS:
            start = max(self.clock[rank], self.clock[peer])
            end = start + time + self.costs.latency
            self._record(rank, send, start, end)
            self._record(peer, receive, start, end)
            self.known[peer][carries(send)] = end
            return
        start = max(self.clock[rank], self.free[rank, peer])
        self.free[rank, peer] = start + time
        arrival = start + time + self.costs.latency
        self.events[rank].append(Event(send, start, arrival))
        if receive in self.opened:
            self.known[peer][carries(send)] = arrival
        else:
            self.arrivals[receive] = arrival

    def _open(self, rank: int, receive: Action) -> None:
        now = self.clock[rank]
        self.events[rank].append(Event(receive, now, now))
        if receive in self.arrivals:
            self.known[rank][carries(receive.partner)] = self.arrivals[receive]
        else:
            self.opened.add(receive)
