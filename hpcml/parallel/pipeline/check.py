"""What makes a schedule wrong. Each mistake is one line that names rank, cell and remedy."""

from __future__ import annotations

from collections import defaultdict

from hpcml.parallel.pipeline.actions import (
    COMPUTE,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    Weights,
)
from hpcml.parallel.pipeline.costs import Costs
from hpcml.parallel.pipeline.execute import Wires, execute
from hpcml.parallel.pipeline.versions import versions

Place = tuple[int, int]
"""Rank, and index in its order."""

HALVES = (Kind.INPUT, Kind.WEIGHT)


def check(schedule: Schedule) -> None:
    """Raise ScheduleError if a table of compute actions is not one that can train a model.

    Every stage must run forward and backward (or both of its halves) of every microbatch once, on
    one rank and in increasing order of microbatches, updates must fit `weights`, and the ranks must
    not wait for each other for ever.
    """
    _stages(schedule)
    places = _places(schedule)
    for rule in (_complete, _ordered, _updates):
        rule(schedule, places)
    execute(schedule, Costs(), Wires.NONE)
    versions(schedule)


def _stages(schedule: Schedule) -> None:
    if not schedule.stages or not all(schedule.orders):
        raise ScheduleError(f"{schedule.name}: a rank without actions: give it a stage")
    for stage, rank in enumerate(schedule.rank_of):
        if not 0 <= rank < schedule.ranks:
            raise ScheduleError(
                f"{schedule.name}: no rank has stage {stage} of {schedule.stages}: add its "
                "actions to one, or number the stages without gaps"
            )


def _places(schedule: Schedule) -> dict[Action, Place]:
    """Where each action is: once, and on the rank of its stage."""
    places: dict[Action, Place] = {}
    for rank, order in enumerate(schedule.orders):
        for cell, action in enumerate(order):
            here = rank, cell
            if action.kind not in COMPUTE:
                _wrong(schedule, here, f"{action.kind} is added by lowering: leave it out")
            if action.stage not in range(schedule.stages):
                _wrong(schedule, here, f"stages go from 0 to {schedule.stages - 1}: use one")
            if action.microbatch not in range(schedule.microbatches):
                _wrong(schedule, here, f"microbatches end at {schedule.microbatches - 1}: use one")
            owner = schedule.rank_of[action.stage]
            if owner != rank:
                _wrong(schedule, here, f"stage {action.stage} is on rank {owner}: move it there")
            if action in places:
                _wrong(schedule, here, f"also in cell {places[action][1] + 1}: remove one")
            places[action] = here
    return places


def _complete(schedule: Schedule, places: dict[Action, Place]) -> None:
    """Nothing is missing."""
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            forward, whole, *halves = (
                Action(stage, kind, microbatch) for kind in (Kind.FORWARD, Kind.BACKWARD, *HALVES)
            )
            there = [half for half in halves if half in places]
            if whole in places and there:
                _wrong(schedule, places[there[0]], f"{whole} does that too: remove one of them")
            if forward not in places:
                _absent(schedule, forward)
            if len(there) == 1:
                other = next(half for half in halves if half not in places)
                _absent(schedule, other, f", the other half of {there[0]}")
            if whole not in places and not there:
                _absent(schedule, whole, f" (or {halves[0]} and {halves[1]})")


def _ordered(schedule: Schedule, places: dict[Action, Place]) -> None:
    """In a stage, causes come before effects and microbatches in increasing order."""
    before = {
        Kind.BACKWARD: (Kind.FORWARD,),
        Kind.INPUT: (Kind.FORWARD,),
        Kind.WEIGHT: (Kind.INPUT,),
        Kind.UPDATE: (Kind.BACKWARD, Kind.WEIGHT),
    }
    latest: dict[tuple[int, Kind], Action] = {}
    for action, (rank, cell) in places.items():
        for kind in before.get(action.kind, ()):
            cause = action._replace(kind=kind)
            if cause in places and places[cause][1] > cell:
                _wrong(
                    schedule,
                    (rank, cell),
                    f"comes before {cause} in cell {places[cause][1] + 1}: exchange them",
                )
        kind = Kind.WEIGHT if action.kind is Kind.BACKWARD else action.kind
        last = latest.get((action.stage, kind), action)
        if last.microbatch > action.microbatch:
            _wrong(
                schedule,
                (rank, cell),
                f"comes after {last} in cell {places[last][1] + 1}: let microbatches come in "
                "increasing order, in which gradients are added whatever the schedule",
            )
        latest[action.stage, kind] = action


def _updates(schedule: Schedule, places: dict[Action, Place]) -> None:
    """Updates are those that `weights` speaks of, the same ones in all stages."""
    made: defaultdict[int, set[int]] = defaultdict(set)
    for action, place in places.items():
        if action.kind is Kind.UPDATE:
            made[action.microbatch].add(action.stage)
            if schedule.synchronous:
                remedy = "leave it out, or write weights: stashed"
                _wrong(schedule, place, f"no update in a synchronous table: {remedy}")
    if schedule.synchronous:
        return
    first = min(made, default=0)
    expected = _ends(schedule, first)
    for microbatch in expected:
        for stage in range(schedule.stages):
            if stage not in made[microbatch]:
                _absent(schedule, Action(stage, Kind.UPDATE, microbatch))
    for action, place in places.items():
        if action.kind is Kind.UPDATE:
            if action.microbatch not in expected:
                _wrong(schedule, place, f"batches have {first + 1} microbatches: remove it")
            _not_late(schedule, places, action)


def _ends(schedule: Schedule, first: int) -> dict[int, None]:
    """The microbatches after which updates come, in order; the first of them is given."""
    every = first + 1 if schedule.weights is Weights.DOUBLE else 1
    ends = [*range(every - 1, schedule.microbatches, every), schedule.microbatches - 1]
    return dict.fromkeys(ends)


def _not_late(schedule: Schedule, places: dict[Action, Place], update: Action) -> None:
    """An update comes before gradients of the next batch are added to its own."""
    for kind in (Kind.BACKWARD, Kind.WEIGHT):
        following = Action(update.stage, kind, update.microbatch + 1)
        if following in places and places[following] < places[update]:
            _wrong(
                schedule,
                places[update],
                f"comes after {following} in cell {places[following][1] + 1}, whose gradient is "
                "for the next update: put it before",
            )


def _wrong(schedule: Schedule, place: Place, what: str) -> None:
    rank, cell = place
    action = schedule.orders[rank][cell]
    raise ScheduleError(
        f"{schedule.name}: rank {rank}, cell {cell + 1} ({action}): {what}", [place]
    )


def _absent(schedule: Schedule, action: Action, what: str = "") -> None:
    """Complain of an action that is missing, where its like of the next microbatch is."""
    rank = schedule.rank_of[action.stage]
    order = schedule.orders[rank]
    stage, kind, microbatch = action
    later = (i for i, (s, k, m) in enumerate(order) if (s, k) == (stage, kind) and m > microbatch)
    cell = next(later, len(order))
    before = f", before cell {cell + 1} ({order[cell]})" if cell < len(order) else ", at the end"
    raise ScheduleError(
        f"{schedule.name}: rank {rank}: {action} is missing{what}: add it{before}",
        absent=(rank, cell, str(action)),
    )
