"""From compute actions to what ranks execute: messages, weights, gradients, activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from hpcml.parallel.pipeline.actions import COMPUTE, RECEIVES, SENDS
from hpcml.parallel.pipeline.lowering import add_messages, add_reductions, add_releases, add_shards
from hpcml.parallel.pipeline.simulate import simulate
from tests.parallel.pipeline.tables import all_sizes, causes, meets

SEND_OF = {Kind.FORWARD: Kind.SEND_F, Kind.BACKWARD: Kind.SEND_B, Kind.INPUT: Kind.SEND_B}


def test_golden() -> None:
    """Neighbours exchange an activation and a gradient: both ranks have them in one order."""
    lowered = lower(SCHEDULES["1f1b"](2, 3))
    assert lowered == parse(
        """
        0F0 0sendF0 0F1 0sendF1 0recvB0 0B0 0release0 0F2 0sendF2 0recvB1 0B1 0release1 \
0recvB2 0B2 0release2 0reduce2
        1recvF0 1F0 1recvF1 1B0 1sendB0 1release0 1F1 1B1 1recvF2 1sendB1 1release1 1F2 \
1B2 1sendB2 1release2 1reduce2
        """,
        "1f1b",
    )


def test_golden_with_every_kind() -> None:
    lowered = lower(SCHEDULES["pipedream"](2, 1), zero3=True)
    assert (
        lowered.orders
        == parse(
            """
        0unshard0 0F0 0sendF0 0reshard0 0recvB0 0unshard0 0B0 0reshard0 0release0 0reduce0 0U0
        1recvF0 1unshard0 1F0 1reshard0 1unshard0 1B0 1sendB0 1reshard0 1release0 1reduce0 1U0
        """
        ).orders
    )
    halves = lower(SCHEDULES["zero-bubble"](1, 2), zero3=True, reduce_each=True)
    assert (
        halves.orders
        == parse(
            """
        0unshard0 0F0 0reshard0 0unshard0 0I0 0reshard0 0W0 0release0 0reduce0 0unshard1 0F1 \
0reshard1 0unshard1 0I1 0reshard1 0W1 0release1 0reduce1
        """
        ).orders
    )


def test_a_single_rank_sends_nothing_to_itself() -> None:
    schedule = parse("0F0 1F0 1B0 0B0")
    assert add_messages(schedule) == schedule
    turn = add_messages(parse("0F0 3F0 3B0 0B0\n1F0 2F0 2B0 1B0"))
    sent = [str(action) for order in turn.orders for action in order if action.kind in SENDS]
    assert sent == ["0sendF0", "3sendB0", "2sendF0", "1sendB0"]


def judge_messages(schedule: Schedule, lowered: Schedule) -> None:
    """What holds for messages, whatever the table."""
    places = {a: i for order in lowered.orders for i, a in enumerate(order)}
    for rank, order in enumerate(lowered.orders):
        assert tuple(a for a in order if a.kind in COMPUTE) == schedule.orders[rank]
        for i, action in enumerate(order):
            if action.kind in SEND_OF:
                send = action._replace(kind=SEND_OF[action.kind])
                to = send.partner.stage
                if 0 <= to < schedule.stages and schedule.rank_of[to] != rank:
                    # Nothing but receives comes before a send, and a receive before its use.
                    assert all(a.kind in RECEIVES for a in order[i + 1 : places[send]])
                    kinds = set(SEND_OF) - {Kind.FORWARD}
                    if action.kind is Kind.FORWARD:
                        kinds = {Kind.FORWARD}
                    users = [Action(to, kind, send.microbatch) for kind in kinds]
                    assert all(places[send.partner] < places[a] for a in users if a in places)
                else:
                    assert send not in places
    sent = [a for order in lowered.orders for a in order if a.kind in SENDS]
    received = [a.partner for order in lowered.orders for a in order if a.kind in RECEIVES]
    assert sorted(sent) == sorted(received)
    assert len(set(sent)) == len(sent)
    assert meets(lowered)


def test_every_schedule_runs_with_synchronous_sends() -> None:
    for _, schedule in all_sizes():
        judge_messages(schedule, add_messages(schedule))
        simulate(lower(schedule), synchronous=True)


@st.composite
def tables(draw: st.DrawFn) -> Schedule:
    """Any table that can run: stages anywhere, each backward whole or in halves, any order."""
    ranks, stages = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    microbatches = draw(st.integers(1, 4))
    rank_of = [draw(st.integers(0, ranks - 1)) for _ in range(stages)]
    backward = (Kind.BACKWARD,), (Kind.INPUT, Kind.WEIGHT)
    left = [
        Action(stage, kind, m)
        for m in range(microbatches)
        for stage in range(stages)
        for kind in (Kind.FORWARD, *draw(st.sampled_from(backward)))
    ]
    there = set(left)
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    while left:
        rest = set(left)
        ready = [
            a
            for a in left
            if not rest.intersection(causes(a, stages, there))
            and not any(
                (b.stage, b.kind) == (a.stage, a.kind) and b.microbatch < a.microbatch for b in left
            )
            and not (a.kind in (Kind.BACKWARD, Kind.WEIGHT) and earlier_gradient(a, left))
        ]
        action = draw(st.sampled_from(ready))
        left.remove(action)
        orders[rank_of[action.stage]].append(action)
    return table("any", [order for order in orders if order])


def earlier_gradient(action: Action, left: list[Action]) -> bool:
    return any(
        a.stage == action.stage
        and a.kind in (Kind.BACKWARD, Kind.WEIGHT)
        and a.microbatch < action.microbatch
        for a in left
    )


@given(schedule=tables())
def test_any_table_that_runs_is_let_pass_and_runs_lowered(schedule: Schedule) -> None:
    check(schedule)
    judge_messages(schedule, add_messages(schedule))
    simulate(lower(schedule, zero3=True), synchronous=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_are_there_when_read_and_only_then(name: str) -> None:
    lowered = add_shards(add_messages(SCHEDULES[name](3, 6)))
    for order in lowered.orders:
        gathered: set[int] = set()
        for action in order:
            if action.kind is Kind.UNSHARD:
                assert not gathered
                gathered.add(action.stage)
            elif action.kind is Kind.RESHARD:
                gathered.remove(action.stage)
            elif action.kind in COMPUTE:
                reads = action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT)
                assert gathered == ({action.stage} if reads else set())
        assert not gathered


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_reduced_when_complete(name: str) -> None:
    schedule = SCHEDULES[name](3, 6)
    ends = schedule.updates() or [5]
    for each in (False, True):
        lowered = add_reductions(add_messages(schedule), each)
        for order in lowered.orders:
            for stage in {action.stage for action in order}:
                own = [a for a in order if a.stage == stage]
                reduced = [a.microbatch for a in own if a.kind is Kind.REDUCE]
                assert reduced == (list(range(6)) if each else ends)
                for m in reduced:
                    place = own.index(Action(stage, Kind.REDUCE, m))
                    made = [a for a in own[:place] if a.kind in (Kind.BACKWARD, Kind.WEIGHT)]
                    assert made[-1].microbatch == m
                    if Action(stage, Kind.UPDATE, m) in own:
                        assert place < own.index(Action(stage, Kind.UPDATE, m))


def test_activations_are_released_after_their_last_use() -> None:
    lowered = add_releases(add_messages(SCHEDULES["zero-bubble"](2, 2)))
    for order in lowered.orders:
        for stage, kind, m in order:
            if kind is Kind.WEIGHT:
                assert order.index(Action(stage, Kind.RELEASE, m)) == 1 + order.index(
                    Action(stage, kind, m)
                )
        assert sum(a.kind is Kind.RELEASE for a in order) == 2


@pytest.mark.parametrize("synchronous", [False, True])
def test_a_lowered_table_that_is_wrong_does_not_run(synchronous: bool) -> None:
    """A message or a release missing or there twice, or a receive behind what it is for."""
    lowered = add_releases(add_messages(SCHEDULES["1f1b"](3, 4)))
    for rank, order in enumerate(lowered.orders):
        for cell, action in enumerate(order):
            head, tail = order[:cell], order[cell + 1 :]
            wrong = []
            if action.kind in (*SENDS, *RECEIVES, Kind.RELEASE):
                wrong = [head + tail, (*head, action, action, *tail)]
            if action.kind in RECEIVES:
                kind = Kind.FORWARD if action.kind is Kind.RECV_F else Kind.BACKWARD
                user = 1 + tail.index(action._replace(kind=kind))
                wrong.append((*head, *tail[:user], action, *tail[user:]))
            for other in wrong:
                orders = (*lowered.orders[:rank], other, *lowered.orders[rank + 1 :])
                with pytest.raises(ScheduleError, match=r"\A1f1b: [^\n]*\Z") as raised:
                    simulate(replace(lowered, orders=orders), synchronous=synchronous)
                assert raised.value.cells or raised.value.absent


def test_everyone_who_waits_is_named() -> None:
    """Both send first: fine with buffers, a deadlock without."""
    crossed = parse(
        """
        0F0 0sendF0 0F1 0sendF1 0recvB0 0B0 0release0 0recvB1 0B1 0release1
        1recvF0 1F0 1B0 1sendB0 1release0 1recvF1 1F1 1B1 1sendB1 1release1
        """,
        "crossed",
    )
    simulate(crossed)
    with pytest.raises(ScheduleError) as raised:
        simulate(crossed, synchronous=True)
    assert str(raised.value) == (
        "crossed: deadlock: rank 0 waits in cell 4 (0sendF1) for 1recvF1; rank 1 waits in cell 4 "
        "(1sendB0) for 0recvB0: change the order of one of them"
    )
    assert raised.value.cells == {(0, 3), (1, 3)}
