"""From compute actions to what a rank executes: passes from table to table.

Order is everything here, time nothing: what a pass adds follows from the table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from hpcml.parallel.pipeline.actions import Action, Kind, Schedule
from hpcml.parallel.pipeline.check import check
from hpcml.parallel.pipeline.costs import Costs
from hpcml.parallel.pipeline.execute import Wires, execute

_SENT_AS = {
    Kind.FORWARD: Kind.SEND_F,
    Kind.BACKWARD: Kind.SEND_B,
    Kind.INPUT: Kind.SEND_B,
}
_GRADIENT = (Kind.BACKWARD, Kind.WEIGHT)
"""After one of them a microbatch has done all for the gradients of a stage."""


def lower(schedule: Schedule, *, zero3: bool = False, reduce_each: bool = False) -> Schedule:
    """Check a table and add everything that ranks do besides computing.

    zero3: gather the weights of a stage for each action. reduce_each: reduce gradients after every
    microbatch (deterministic mode), not once when they are complete.
    """
    check(schedule)
    lowered = add_releases(add_reductions(add_messages(schedule), reduce_each))
    return add_shards(lowered) if zero3 else lowered


def add_messages(schedule: Schedule, before: Iterable[Action] = ()) -> Schedule:
    """Add sends and receives that cannot deadlock, even if a send waits for its receive.

    Actions of all ranks are put in one sequence: compute when it starts, a message, send and
    receive at once, when what it carries is there, with the usual costs and messages that take no
    time. The order of a rank is its part of that sequence. Whatever the ranks have done so far, the
    first item of the sequence that is still to be done can be done: everything before it is, and
    the one or two ranks that it concerns have arrived at it. Hence ranks never wait in a circle,
    neighbours that exchange agree on who sends first, and all that one rank sends another is
    received in the order in which it was sent.

    Between a result and its send a rank does nothing but receive what was ready before.

    before: what was done, and sent, ahead of this table, if it goes on from another one.
    """
    sequence: list[tuple[float, int, list[tuple[int, Action]]]] = []
    for rank, events in enumerate(execute(schedule, Costs(), Wires.NONE, before)):
        for action, start, end in events:
            # Messages before what starts at the same time: it may need them.
            sequence.append((start, 1, [(rank, action)]))
            if send := _send_of(schedule, action):
                peer = schedule.rank_of[send.partner.stage]
                sequence.append((end, 0, [(rank, send), (peer, send.partner)]))
    orders: list[list[Action]] = [[] for _ in schedule.orders]
    for _, _, members in sorted(sequence, key=lambda item: item[:2]):  # stable: ranks in order
        for rank, action in members:
            orders[rank].append(action)
    return replace(schedule, orders=tuple(map(tuple, orders)))


def add_reductions(schedule: Schedule, each: bool = False) -> Schedule:
    """Reduce the gradients of a stage when they are complete: for its update, or at the end.

    each: after every microbatch.
    """
    ends = set(range(schedule.microbatches) if each else schedule.updates())
    ends.add(schedule.microbatches - 1)

    def after(action: Action) -> list[Action]:
        complete = action.kind in _GRADIENT and action.microbatch in ends
        return [action._replace(kind=Kind.REDUCE)] if complete else []

    return _follow(schedule, after)


def add_releases(schedule: Schedule) -> Schedule:
    """Let go what a microbatch has kept after the last backward of a stage that uses it."""

    def after(action: Action) -> list[Action]:
        return [action._replace(kind=Kind.RELEASE)] if action.kind in _GRADIENT else []

    return _follow(schedule, after)


def add_shards(schedule: Schedule) -> Schedule:
    """Gather the weights of a stage before each action that reads them, and let them go after it.

    Gradients of weights (W) are made without the weights, and an update is of the own part.
    """
    reading = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT)

    def before(order: tuple[Action, ...]) -> Iterator[Action]:
        for action in order:
            if action.kind in reading:
                yield action._replace(kind=Kind.UNSHARD)
            yield action

    def after(action: Action) -> list[Action]:
        return [action._replace(kind=Kind.RESHARD)] if action.kind in reading else []

    gathered = replace(schedule, orders=tuple(tuple(before(o)) for o in schedule.orders))
    return _follow(gathered, after)


def _send_of(schedule: Schedule, action: Action) -> Action | None:
    """The send of what an action makes, if another rank needs it."""
    if action.kind not in _SENT_AS:
        return None
    send = action._replace(kind=_SENT_AS[action.kind])
    to = send.partner.stage
    local = not 0 <= to < schedule.stages or schedule.rank_of[to] == schedule.rank_of[send.stage]
    return None if local else send


def _follow(schedule: Schedule, after: Callable[[Action], list[Action]]) -> Schedule:
    """Add what comes after actions, behind the send of their result: others wait for that."""

    def order(actions: tuple[Action, ...]) -> Iterator[Action]:
        waiting: dict[Action, list[Action]] = {}
        there = set(actions)
        for action in actions:
            yield action
            added = after(action)
            send = _send_of(schedule, action)
            if send in there:
                waiting[send] = added
            else:
                yield from added
            yield from waiting.pop(action, [])

    return replace(schedule, orders=tuple(tuple(order(actions)) for actions in schedule.orders))
