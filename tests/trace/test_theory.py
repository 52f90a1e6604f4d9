"""Pipelines beside their theory."""

from __future__ import annotations

import pytest

from hpcml.parallel.pipeline import Kind
from hpcml.trace.summary import summary
from hpcml.trace.theory import theories, theory
from tests.trace.support import recorded, wait

FIRST = recorded(0, {"pp": 0, "dp": 0}, [
    ("0F0", 0, 10), ("0sendF0", 10, 11), ("0F1", 11, 23), ("0sendF1", 23, 24),
    ("0recvB0", 24, 24), ("0B0", 24, 60), ("0release0", 60, 60), ("0recvB1", 60, 60),
    ("0B1", 60, 100), ("0release1", 100, 100), ("U", 105, 110),
], [wait(24, 38), wait(60, 82)])  # fmt: skip
LAST = recorded(1, {"pp": 1, "dp": 0}, [
    ("1recvF0", 0, 0), ("1F0", 0, 20), ("1B0", 20, 37), ("1release0", 37, 37),
    ("1sendB0", 37, 37), ("1recvF1", 37, 37), ("1F1", 37, 47), ("1B1", 47, 77),
    ("1sendB1", 79, 80), ("1release1", 80, 80), ("U", 105, 110),
], [wait(0, 13)])  # fmt: skip


def test_a_pipeline_by_hand() -> None:
    found = theory([FIRST, LAST])
    costs = found.costs.stages
    assert (costs[0, Kind.FORWARD], costs[1, Kind.FORWARD]) == (11, (7 + 10) / 2)
    assert (costs[0, Kind.BACKWARD], costs[1, Kind.BACKWARD]) == ((22 + 18) / 2, (17 + 30) / 2)
    # 0F0's message took 3 from 10 on, 1B0's 1 from 37 on, 1B1's 3 from 79 on. 1F1 did not wait.
    assert found.costs.kinds[Kind.SEND_F] == found.costs.kinds[Kind.SEND_B] == 3
    assert (found.start, found.makespan) == (0, 100)
    assert found.busy == [62, 64]
    assert found.bubble == pytest.approx(1 - 126 / 200)
    # Ends with F0 of the first, all of the last, whose input comes in time, B1 of the first.
    assert found.simulation.makespan == 11 + 3 + 2 * (8.5 + 23.5) + 3 + 20
    assert found.ratio == 100 / 101
    assert found.simulation.peaks == (2, 1)


def test_every_pipeline_has_its_own() -> None:
    assert theories([recorded(0, {"pp": 0, "dp": 0}, [("0F0", 0, 1)])]) == []
    others = [
        recorded(one.rank + 2, {"pp": one.coords["pp"], "dp": 1}, (), one.calls)
        for one in (FIRST, LAST)
    ]
    for other, one in zip(others, (FIRST, LAST), strict=True):
        other.work.extend(one.work)  # type: ignore[attr-defined]
    found = theories([others[1], FIRST, LAST, others[0]])
    assert [[rank.rank for rank in one.ranks] for one in found] == [[2, 3], [0, 1]]
    assert found[0].makespan == found[1].makespan
    lines = summary([FIRST, LAST]).splitlines()
    assert lines[-1].startswith("pipeline of ranks 0, 1: 100000.0 ms, 0.990 of the simulation")


def test_a_pipeline_that_goes_on_after_the_step_has_none() -> None:
    first = recorded(0, {"pp": 0}, [("0F3", 0, 1), ("0sendF3", 1, 1), ("0recvB2", 1, 1),
                                    ("0B2", 1, 2), ("0release2", 2, 2)])  # fmt: skip
    last = recorded(1, {"pp": 1}, [("1recvF3", 0, 0)])
    assert theories([first, last]) == []
