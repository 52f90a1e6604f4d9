"""Tables that are wrong: every mistake is one line that names rank, cell and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hpcml.parallel.pipeline import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    check,
    lower,
    parse,
    table,
)
from hpcml.parallel.pipeline.simulate import simulate
from tests.parallel.pipeline.tables import runs

Orders = list[list[Action]]


def small(name: str) -> Schedule:
    return SCHEDULES[name](3, 6 if name == "interleaved" else 5)


def complaint(schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError, match=r"\A[^\n]*\Z") as raised:
        check(schedule)
    return raised.value


def remade(schedule: Schedule, orders: Orders) -> Schedule:
    """The table as it would be read from a file."""
    return table(schedule.name, orders, schedule.weights)


def cells(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for rank, order in enumerate(schedule.orders):
        for cell, action in enumerate(order):
            yield rank, cell, action


def copied(schedule: Schedule) -> Orders:
    return [list(order) for order in schedule.orders]


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_action_removed_is_missed(name: str) -> None:
    schedule = small(name)
    for rank, cell, action in cells(schedule):
        orders = copied(schedule)
        del orders[rank][cell]
        error = complaint(remade(schedule, orders))
        assert f"rank {rank}: {action} is missing" in str(error)
        assert error.absent is not None
        assert (error.absent[0], error.absent[2]) == (rank, str(action))
        following = orders[rank][error.absent[1] :][:1]
        assert all(a.kind is action.kind and a.microbatch > action.microbatch for a in following)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_action_twice_or_on_another_rank_is_found(name: str) -> None:
    schedule = small(name)
    for rank, cell, action in cells(schedule):
        for other in range(schedule.ranks):
            for place in (0, len(schedule.orders[other])):
                twice = copied(schedule)
                twice[other].insert(place, action)
                error = str(complaint(remade(schedule, twice)))
                assert f"({action}): " in error
                assert ("also in cell" if other == rank else f"is on rank {rank}") in error
                if other != rank:
                    moved = copied(schedule)
                    moved[other].insert(place, moved[rank].pop(cell))
                    error = str(complaint(remade(schedule, moved)))
                    assert f"({action}): stage {action.stage} is on rank {rank}: move" in error


def increasing(schedule: Schedule) -> bool:
    """Whether forwards, gradients for inputs and those for weights come by microbatch."""
    for order in schedule.orders:
        for stage in {action.stage for action in order}:
            for kinds in ("F", "I", "BW", "U"):
                found = [m for s, kind, m in order if s == stage and kind in kinds]
                if found != sorted(found):
                    return False
    return True


def other_orders(schedule: Schedule) -> Iterator[Schedule]:
    """The table with two actions of a rank exchanged, and with one moved along it."""
    for rank, first, action in cells(schedule):
        for second in range(len(schedule.orders[rank])):
            orders = copied(schedule)
            orders[rank].insert(second, orders[rank].pop(first))
            if second != first:
                yield remade(schedule, orders)
            if second > first + 1:
                orders = copied(schedule)
                orders[rank][first], orders[rank][second] = orders[rank][second], action
                yield remade(schedule, orders)


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_order_is_refused_unless_it_trains_the_same_model(name: str) -> None:
    """What is let pass runs and adds gradients in the same order: another schedule, no mistake.

    Of updates more is asked than that they come after their gradients.
    """
    schedule = SCHEDULES[name](3, 3)
    refused = passed = 0
    for other in other_orders(schedule):
        if runs(other) and increasing(other) and schedule.synchronous:
            check(other)
            passed += 1
        elif not (runs(other) and increasing(other)):
            complaint(other)
            refused += 1
        else:
            try:
                check(other)
            except ScheduleError:
                refused += 1
    assert refused > passed


MISTAKES = {
    "0F0 0B0\n2F0 2B0": "no rank has stage 1 of 3: add its actions to one, or number the stages "
    "without gaps",
    "0F0 0B0 0F1\n1F0 1F1 1B0 1B1": "rank 0: 0B1 is missing (or 0I1 and 0W1): add it, at the end",
    "0F0 0F2 0B0 0B1 0B2": "rank 0: 0F1 is missing: add it, before cell 2 (0F2)",
    "0F0 0I0": "rank 0: 0W0 is missing, the other half of 0I0: add it, at the end",
    "0F0 0W0": "rank 0: 0I0 is missing, the other half of 0W0: add it, at the end",
    "0F0 0B0 0W0": "rank 0, cell 3 (0W0): 0B0 does that too: remove one of them",
    "0F0 0B0 0F0": "rank 0, cell 3 (0F0): also in cell 1: remove one",
    "0F0 0B0 1F0\n1F1 1B0 1B1 0F1 0B1": "rank 0, cell 3 (1F0): stage 1 is on rank 1: move it",
    "0B0 0F0": "rank 0, cell 1 (0B0): comes before 0F0 in cell 2: exchange them",
    "0F0 0W0 0I0": "rank 0, cell 2 (0W0): comes before 0I0 in cell 3: exchange them",
    "0F0 0F1 0B1 0B0": "rank 0, cell 4 (0B0): comes after 0B1 in cell 3: let microbatches come in "
    "increasing order",
    "0F0 0F1 0I0 0I1 0W1 0B2 0F2 0W0": "rank 0, cell 6 (0B2): comes before 0F2 in cell 7",
    "0F0 0sendF0 0B0": "rank 0, cell 2 (0sendF0): sendF is added by lowering: leave it out",
    "0F0 0F1 0B0 0B1\n1F1 1F0 1B0 1B1": "rank 1, cell 2 (1F0): comes after 1F1 in cell 1",
    "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1": "deadlock: rank 0 waits in cell 2 (0B0) for 1B0; rank 1 "
    "waits in cell 2 (1F1) for 0F1: change the order of one of them",
    "0F0 0B0\n1B0 1F0": "rank 1, cell 1 (1B0): comes before 1F0",
    "weights: synchronous\n0F0 0B0 0U0": "rank 0, cell 3 (0U0): no update in a synchronous table: "
    "leave it out, or write weights: stashed",
    "0F0 0B0 0U0\n1F0 1B0": "rank 1: 1U0 is missing: add it, at the end",
    "0F0 0B0 0F1 0B1 0U1": "rank 0: 0U0 is missing: add it, before cell 5 (0U1)",
    "weights: stashed\n0F0 0B0": "rank 0: 0U0 is missing",
    "0F0 0U0 0B0": "rank 0, cell 2 (0U0): comes before 0B0 in cell 3: exchange them",
    "0F0 0I0 0U0 0W0": "rank 0, cell 3 (0U0): comes before 0W0 in cell 4: exchange them",
    "0F0 0B0 0F1 0B1 0U0 0U1": "rank 0, cell 5 (0U0): comes after 0B1 in cell 4, whose gradient is "
    "for the next update: put it before",
    "weights: double\n0F0 0B0 0F1 0B1 0U1 0F2 0B2 0U2 0F3 0B3 0U3": "rank 0, cell 8 (0U2): batches "
    "have 2 microbatches: remove it",
    "weights: double\n0F0 0F1 0F2 0B0 0U0 0B1 0U1 0B2 0U2": "rank 0, cell 3 (0F2): weights: double "
    "gives it those of 1 updates, of which 0 are made: put updates earlier",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_messages(text: str) -> None:
    error = complaint(parse(text, "mine"))
    assert f"mine: {MISTAKES[text]}" in str(error)
    assert error.exit_code == 2


def test_vertical_sync_needs_the_versions_of_the_first_stage() -> None:
    """Stage 1 makes its first update after forward 1, for which stage 0 has made one."""
    late = "weights: vertical\n0F0 0B0 0U0 0F1 0B1 0U1\n1F0 1B0 1F1 1B1 1U0 1U1"
    assert "1U0): comes after 1B1" in str(complaint(parse(late)))
    late = late.replace("1F1 1B1 1U0", "1F1 1U0 1B1")
    assert "(1F1): weights: vertical gives it those of 1" in str(complaint(parse(late)))
    check(parse(late.replace("1F1 1U0", "1U0 1F1")))


def test_tables_made_by_hand_are_checked_too() -> None:
    good = parse("0F0 0B0\n1F0 1B0")
    check(good)
    for wrong in (
        replace(good, orders=(*good.orders, ())),
        replace(good, rank_of=(0, 2)),
        replace(good, rank_of=(0,)),
        replace(good, rank_of=(0, 1, 1)),
        replace(good, microbatches=2),
        replace(good, microbatches=0),
        replace(good, orders=(good.orders[0], (Action(-1, Kind.FORWARD, 0),))),
        Schedule("empty", (), (), 0),
    ):
        assert complaint(wrong)


OWN = {
    "a deeper warm-up": """
        0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
        1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
    """,
    "halves for some microbatches": "0F0 0F1 0I0 0W0 0B1",
    "there and back": """
        0F0 0F1 3F0 3I0 3F1 3W0 3I1 0I0 0W0 3W1 0I1 0W1
        1F0 2F0 1F1 2F1 2I0 1I0 2W0 1W0 2I1 1I1 2W1 1W1
    """,
    "batches of two": "weights: double\n0F0 0B0 0F1 0B1 0U1 0F2 0B2 0U2",
}


@pytest.mark.parametrize("name", OWN)
def test_schedules_of_ones_own_pass(name: str) -> None:
    schedule = parse(OWN[name])
    check(schedule)
    assert runs(schedule)
    simulate(lower(schedule), synchronous=True)
