"""Tables for tests, and a judge of them that shares nothing with the package's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from hpcml.parallel.pipeline import SCHEDULES, Action, Kind, Schedule
from hpcml.parallel.pipeline.actions import RECEIVES, SENDS

SIZES = [(ranks, microbatches) for ranks in range(1, 7) for microbatches in range(1, 13)]


def all_sizes() -> Iterator[tuple[str, Schedule]]:
    """Every built-in schedule at 1 to 6 ranks and 1 to 12 microbatches, where it takes them."""
    for name, make in SCHEDULES.items():
        for ranks, microbatches in SIZES:
            if name != "interleaved" or microbatches % ranks == 0:
                yield name, make(ranks, microbatches)


def causes(action: Action, stages: int, there: Iterable[Action]) -> list[Action]:
    """The compute actions whose results an action needs."""
    stage, kind, m = action
    if kind is Kind.FORWARD:
        wanted = [Action(stage - 1, Kind.FORWARD, m)] if stage else []
    elif kind in (Kind.BACKWARD, Kind.INPUT):
        behind = [(stage + 1, Kind.BACKWARD, m), (stage + 1, Kind.INPUT, m)]
        wanted = [(stage, Kind.FORWARD, m), *(behind if stage < stages - 1 else [])]
    elif kind is Kind.WEIGHT:
        wanted = [(stage, Kind.INPUT, m)]
    else:
        wanted = [(stage, Kind.BACKWARD, m), (stage, Kind.WEIGHT, m)]
    return [Action(*a) for a in wanted if a in there]


def runs(schedule: Schedule) -> bool:
    """Whether order and causes of a compute table contain no circle."""
    graph: dict[Action, list[Action]] = {}
    there = {action for order in schedule.orders for action in order}
    for order in schedule.orders:
        for i, action in enumerate(order):
            graph[action] = [*order[max(0, i - 1) : i], *causes(action, schedule.stages, there)]
    return acyclic(graph)


def meets(schedule: Schedule) -> bool:
    """Whether a lowered table runs with synchronous sends: a message is one event of two ranks."""
    graph: dict[object, list[object]] = {}
    for rank, order in enumerate(schedule.orders):
        before: list[object] = []
        for cell, action in enumerate(order):
            if action.kind in RECEIVES:
                event: object = action.partner
            else:
                event = action if action.kind in SENDS else (rank, cell)
            graph.setdefault(event, []).extend(before)
            before = [event]
    return acyclic(graph)


def acyclic(graph: dict[object, list[object]] | dict[Action, list[Action]]) -> bool:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True
