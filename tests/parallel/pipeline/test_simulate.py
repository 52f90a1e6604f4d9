"""Simulated schedules against closed forms, published numbers and other ways to compute them."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml.errors import UserError
from hpcml.parallel.pipeline import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Schedule,
    Simulation,
    lower,
    parse,
    simulate,
)
from hpcml.parallel.pipeline.schedules import interleaved
from tests.parallel.pipeline.tables import SIZES, causes


def simulated(name: str, ranks: int, microbatches: int, costs: Costs | None = None) -> Simulation:
    return simulate(lower(SCHEDULES[name](ranks, microbatches)), costs)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "pipedream", "pipedream-2bw"])
def test_bubble_and_activations_of_gpipe_and_1f1b(name: str) -> None:
    """Huang et al. 2018, section 2.3: (K - 1) / (M + K - 1) of the time."""
    for ranks, microbatches in SIZES:
        found = simulated(name, ranks, microbatches)
        assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
        assert found.bubble_of_ideal == pytest.approx((ranks - 1) / microbatches)
        assert found.idle == pytest.approx([found.bubble] * ranks)
        assert found.makespan == 3 * (microbatches + ranks - 1)
        # Activations kept: all M by GPipe, min(K - s, M) on stage s by what is made of 1F1B.
        fewer = [min(ranks - stage, microbatches) for stage in range(ranks)]
        assert list(found.peaks) == ([microbatches] * ranks if name == "gpipe" else fewer)


def test_a_naive_pipeline_is_as_slow_as_one_rank() -> None:
    for ranks, microbatches in SIZES:
        found = simulated("naive", ranks, microbatches)
        assert found.makespan == 3 * ranks * microbatches
        assert found.peaks == (1,) * ranks


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved(chunks: int) -> None:
    """Megatron-LM 2021, section 2.2.2: the bubble is (p - 1) / (v m) of the ideal time.

    Korthikanti et al. 2022, section 4.2.3: the first rank keeps 1 + (p - 1) / (p v) times the
    activations of p microbatches.
    """
    for ranks in range(1, 7):
        for microbatches in range(ranks, 13, ranks):
            found = simulate(lower(interleaved(ranks, microbatches, chunks)))
            assert found.bubble_of_ideal == pytest.approx((ranks - 1) / (chunks * microbatches))
            if microbatches > ranks:
                whole = ranks * chunks * (1 + (ranks - 1) / (ranks * chunks))
                assert found.peaks[0] == round(whole)
            assert max(found.peaks) == found.peaks[0]


@pytest.mark.parametrize("text", ["F=1,I=1,W=1", "F=2,I=3,W=1", "F=2,I=2,W=1.5"])
def test_zero_bubble(text: str) -> None:
    """Qi et al. 2023, table 2: idle (p - 1)(F + I - W) instead of (p - 1)(F + I + W)."""
    costs = Costs.parse(text)
    f, i, w = (costs.of(Action(0, kind, 0)) for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT))
    whole = Costs({Kind.FORWARD: f, Kind.BACKWARD: i + w})
    for ranks, microbatches in SIZES:
        found = simulated("zero-bubble", ranks, microbatches, costs)
        plain = simulated("1f1b", ranks, microbatches, whole)
        assert max(found.peaks) == max(plain.peaks)
        idle = found.makespan - microbatches * (f + i + w)
        assert plain.makespan - microbatches * (f + i + w) == pytest.approx(
            (ranks - 1) * (f + i + w)
        )
        if ranks > 1:
            assert found.bubble < plain.bubble
        if microbatches >= ranks:
            assert idle == pytest.approx((ranks - 1) * (f + i - w))


def test_published_speed_ups() -> None:
    """What GPipe's formula says for its table 2 at 32 microbatches; measured were 93 to 96 %."""
    speedups = [k * (1 - simulated("gpipe", k, 32).bubble) for k in (2, 4, 8)]
    assert speedups == pytest.approx([1.94, 3.66, 6.56], abs=0.005)
    assert simulated("gpipe", 8, 32).bubble < 0.2  # negligible from M = 4 K on, section 2.3


def test_published_interleaving() -> None:
    """Figure 4 of Megatron-LM 2021: 4 devices, 8 microbatches, 2 chunks halve the bubble."""
    plain, chunked = simulated("1f1b", 4, 8), simulate(lower(interleaved(4, 8, 2)))
    assert plain.makespan == 33
    assert chunked.makespan / 2 == 28.5  # its chunks are half as long
    assert (plain.bubble_of_ideal, chunked.bubble_of_ideal) == (3 / 8, 3 / 16)
    assert plain.peaks[0] == 4
    assert chunked.peaks[0] / 2 == 4 * (1 + 3 / 8)


def test_steady_state_of_pipedream() -> None:
    """Figure 4 of PipeDream 2019: between warm-up and drain nobody waits, and every worker takes
    forward and backward in turn, with an update after each backward."""
    ranks, microbatches = 4, 30
    found = simulated("pipedream", ranks, microbatches)
    for rank, events in enumerate(found.events):
        compute = [e for e in events if e.action.kind in (Kind.FORWARD, Kind.BACKWARD)]
        first = next(e for e in compute if e.action.kind is Kind.BACKWARD)
        last = [e for e in compute if e.action.kind is Kind.FORWARD][-1]
        steady = compute[compute.index(first) : compute.index(last) + 1]
        assert len(steady) == 2 * (microbatches - (ranks - rank))
        for before, after in pairwise(steady):
            assert after.start == before.end
            assert {before.action.kind, after.action.kind} == {Kind.FORWARD, Kind.BACKWARD}
        # NOAM, section 3.2: as many microbatches in flight as there are workers.
        assert compute.index(first) == ranks - rank
    assert found.versions == (4, 3, 2, 1)
    assert found.staleness == (3, 2, 1, 0)


def longest_path(schedule: Schedule, costs: Costs) -> float:
    """The makespan of a compute table on wires without delay."""
    there = {action for order in schedule.orders for action in order}
    graph = {
        action: {*order[max(0, i - 1) : i], *causes(action, schedule.stages, there)}
        for order in schedule.orders
        for i, action in enumerate(order)
    }
    ends: dict[Action, float] = {}
    for action in TopologicalSorter(graph).static_order():
        ends[action] = max((ends[a] for a in graph[action]), default=0.0) + costs.of(action)
    return max(ends.values())


@given(
    name=st.sampled_from(list(SCHEDULES)),
    ranks=st.integers(1, 4),
    rounds=st.integers(1, 3),
    kinds=st.dictionaries(st.sampled_from("FBIWU"), st.integers(0, 9)),
    stages=st.dictionaries(
        st.tuples(st.integers(0, 3), st.sampled_from("FBIWU")), st.integers(0, 9)
    ),
)
def test_any_costs(
    name: str,
    ranks: int,
    rounds: int,
    kinds: dict[str, float],
    stages: dict[tuple[int, str], float],
) -> None:
    schedule = SCHEDULES[name](ranks, ranks * rounds)
    of_stages = {(s, Kind(k)): cost for (s, k), cost in stages.items() if s < schedule.stages}
    costs = Costs({Kind(k): cost for k, cost in kinds.items()}, of_stages)
    lowered = lower(schedule)
    found, waiting = simulate(lowered, costs), simulate(lowered, costs, synchronous=True)
    assert found.makespan == pytest.approx(longest_path(schedule, costs))
    assert waiting.makespan >= found.makespan
    assert waiting.busy == pytest.approx(found.busy)
    for events, order in zip(waiting.events, lowered.orders, strict=True):
        assert tuple(event.action for event in events) == order
        assert all(before.end <= after.start for before, after in pairwise(events))


def test_latency_and_transfer() -> None:
    """By hand: 2 ranks, 2 microbatches; a message takes 1 on the way and 0.5 more to arrive."""
    costs = Costs.parse("F=1,B=2,sendF=1,sendB=1", latency=0.5)
    lowered = lower(parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"))

    def times(found: Simulation, rank: int) -> dict[str, tuple[float, float]]:
        return {str(e.action): (e.start, e.end) for e in found.events[rank]}

    first, second = (times(simulate(lowered, costs), rank) for rank in (0, 1))
    assert first["0sendF0"] == (1, 2.5)
    assert first["0F1"] == (1, 2)  # while F0's result is on its way
    assert first["0sendF1"] == (2, 3.5)
    assert second["1F0"] == (2.5, 3.5)
    assert second["1B0"] == (3.5, 5.5)
    assert first["0B0"] == (7, 9)
    assert second["1F1"] == (5.5, 6.5)
    assert second["1B1"] == (6.5, 8.5)
    assert first["0B1"] == (10, 12)
    first, second = (times(simulate(lowered, costs, synchronous=True), rank) for rank in (0, 1))
    assert first["0sendF0"] == second["1recvF0"] == (1, 2.5)
    assert first["0F1"] == (2.5, 3.5)


def test_a_message_waits_for_the_way_to_be_free() -> None:
    costs = Costs.parse("F=1,sendF=3", latency=0.5)
    found = simulate(lower(parse("0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1")), costs)
    sends = [(e.start, e.end) for e in found.events[0] if e.action.kind is Kind.SEND_F]
    assert sends == [(1, 4.5), (4, 7.5)]


def test_costs() -> None:
    costs = Costs.parse("F=1.5, B=3,2F=4,2W=1,unshard=0.25", latency=2)
    of = {text: costs.of(parse(text).orders[0][0]) for text in ("0F1", "2F1", "0B0", "0I0", "2W0")}
    assert of == {"0F1": 1.5, "2F1": 4, "0B0": 3, "0I0": 1.5, "2W0": 1}
    assert costs.of(Action(1, Kind.UNSHARD, 0)) == 0.25
    assert costs.latency == 2
    usual = Costs.parse("")
    assert [usual.of(Action(0, kind, 0)) for kind in list(Kind)[:6]] == [1, 2, 1, 1, 0, 0]
    sharded = lower(SCHEDULES["gpipe"](1, 2), zero3=True)
    found = simulate(sharded, Costs.parse("F=1.5,B=3,unshard=0.25,0reshard=0.5,reduce=2"))
    assert found.makespan == found.busy[0] == 2 * (1.5 + 3) + 4 * 0.75 + 2


@pytest.mark.parametrize(
    "text", ["F", "X=1", "F=one", "F=nan", "F=-1", "1=2", "B=inf", "F==1", "recvF=1"]
)
def test_wrong_costs_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"\A[^\n]*(write kind=number|a number)[^\n]*\Z"):
        Costs.parse(text)


def test_costs_of_what_is_not_there() -> None:
    with pytest.raises(UserError, match="latency=-1: a cost is a number, 0 or more"):
        Costs(latency=-1)
    with pytest.raises(UserError, match="cost of 4F: gpipe has stages 0 to 3"):
        simulated("gpipe", 4, 4, Costs.parse("4F=2"))


def test_a_pipeline_that_takes_no_time_is_never_idle() -> None:
    found = simulated("gpipe", 2, 2, Costs.parse("F=0,B=0"))
    assert (found.makespan, found.bubble, found.bubble_of_ideal) == (0, 0, 0)
