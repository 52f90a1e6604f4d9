"""Which weights each microbatch sees in schedules with updates, and what that costs.

A version is the number of updates a stage has made: version 0 is the first values.
"""

from __future__ import annotations

from bisect import bisect_left

from hpcml.parallel.pipeline.actions import Kind, Schedule, ScheduleError, Weights

Place = tuple[int, int]
"""Stage and microbatch."""


def versions(schedule: Schedule) -> dict[Place, int]:
    """The version that forward and backward of a microbatch use in a stage; see `Weights`.

    Raises ScheduleError where that version does not exist yet when forward runs.
    """
    newest = [0] * schedule.stages
    at_forward: dict[Place, tuple[int, int, int]] = {}  # rank, cell, newest version
    for rank, order in enumerate(schedule.orders):
        for cell, (stage, kind, microbatch) in enumerate(order):
            if kind is Kind.FORWARD:
                at_forward[stage, microbatch] = rank, cell, newest[stage]
            newest[stage] += kind is Kind.UPDATE
    ends = schedule.updates()
    used: dict[Place, int] = {}
    for (stage, microbatch), (rank, cell, there) in at_forward.items():
        if schedule.weights is Weights.DOUBLE:
            version = max(0, bisect_left(ends, microbatch) - 1)
        elif schedule.weights is Weights.VERTICAL:
            version = at_forward[0, microbatch][2]
        else:
            version = there
        if version > there:
            raise ScheduleError(
                f"{schedule.name}: rank {rank}, cell {cell + 1} "
                f"({schedule.orders[rank][cell]}): weights: {schedule.weights} gives it those of "
                f"{version} updates, of which {there} are made: put updates earlier",
                [(rank, cell)],
            )
        used[stage, microbatch] = version
    return used


def held(schedule: Schedule) -> tuple[int, ...]:
    """For each stage the most versions of its weights that must be kept at once.

    The newest one, and all that a microbatch uses whose backward is still to come.
    """
    used, counts = versions(schedule), [1] * schedule.stages
    newest = [0] * schedule.stages
    for stage, microbatch in _updates(schedule):
        newest[stage] += 1
        kept = {newest[stage]}
        for later in range(microbatch + 1, schedule.microbatches):
            if used[stage, later] >= newest[stage]:  # they never decrease
                break
            kept.add(used[stage, later])
        counts[stage] = max(counts[stage], len(kept))
    return tuple(counts)


def staleness(schedule: Schedule) -> dict[Place, int]:
    """For each update (stage and its last microbatch) how many updates old its gradients are.

    Of a batch of microbatches the oldest counts.
    """
    used, late = versions(schedule), {}
    newest, first = [0] * schedule.stages, [0] * schedule.stages
    for stage, microbatch in _updates(schedule):
        late[stage, microbatch] = newest[stage] - used[stage, first[stage]]
        newest[stage] += 1
        first[stage] = microbatch + 1
    return late


def _updates(schedule: Schedule) -> list[Place]:
    """The updates, those of a stage in their order."""
    return [(s, m) for order in schedule.orders for s, kind, m in order if kind is Kind.UPDATE]
