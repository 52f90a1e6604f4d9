"""Grids: what runs when, and where a table is wrong."""

from __future__ import annotations

import pytest

from hpcml.parallel.pipeline import (
    SCHEDULES,
    Costs,
    ScheduleError,
    check,
    lower,
    parse,
    simulate,
    table,
)
from hpcml.parallel.pipeline.draw import COLUMNS, TICK, broken, grid


def drawn(text: str, costs: str = "", latency: float = 0.0) -> list[str]:
    return grid(simulate(lower(parse(text)), Costs.parse(costs, latency))).splitlines()


def marked(text: str) -> list[str]:
    schedule = parse(text)
    with pytest.raises(ScheduleError) as raised:
        check(schedule)
    return broken(schedule, raised.value).splitlines()


def test_time_goes_across_and_waiting_is_dots() -> None:
    assert grid(simulate(lower(SCHEDULES["gpipe"](3, 2)))).splitlines() == [
        "time    0              5              10",
        "rank 0  F0 F1 .  .  .  .  .  .  B0--- B1---",
        "rank 1  .  F0 F1 .  .  .  B0--- B1--- .  .",
        "rank 2  .  .  F0 F1 B0--- B1--- .  .  .  .",
    ]


def test_a_rank_with_several_stages_names_them() -> None:
    assert drawn("0F0 2F0 2B0 0B0\n1F0 1B0") == [
        "time    0                   5",
        "rank 0  0F0 .   2F0 2B0---- .   .   0B0----",
        "rank 1  .   F0- .   .   .   B0----- .   .",
    ]


def test_a_column_is_the_shortest_action() -> None:
    assert drawn("0F0 0B0\n1F0 1B0", "F=0.5,B=1,1F=1.6", 0.5) == [
        "time    0              2.5            5",
        "rank 0  F0 .  .  .  .  .  .  .  B0---",
        "rank 1  .  .  F0------ B0--- .  .  .",
    ]


def test_rounding_leaves_no_gaps() -> None:
    """0.1 + 0.2 is no multiple of 0.1."""
    found = simulate(lower(SCHEDULES["gpipe"](1, 3)), Costs.parse("F=0.1,B=0.2"))
    assert grid(found).splitlines()[1] == "rank 0  F0 F1 F2 B0--- B1--- B2---"


def test_what_takes_no_time_is_not_drawn() -> None:
    assert drawn("0F0 0B0 0U0 0F1 0B1 0U1", "B=0") == ["time    0", "rank 0  F0 F1"]
    assert drawn("0F0 0B0 0U0", "U=1")[1] == "rank 0  F0 B0--- U0"
    assert drawn("0F0 0B0", "F=0,B=0") == ["time    0", "rank 0"]


def test_a_grid_has_an_end() -> None:
    heading, row = drawn("0F0 0B0", "F=1,B=1e9")
    assert len(row) <= len("rank 0  ") + 3 * COLUMNS
    assert len(heading.split()) == 2 + COLUMNS // TICK


def test_what_is_wrong_is_marked() -> None:
    assert marked("0F0 0B0 0F1 0B1\n1F0 1F1 1B1 1B0") == [
        "rank 0   0F0  0B0  0F1  0B1",
        "rank 1   1F0  1F1  1B1 [1B0]",
    ]


def test_what_is_missing_is_marked_where_it_belongs() -> None:
    assert marked("0F0 0F1 0B1\n1F0 1F1 1B0 1B1") == [
        "rank 0   0F0   0F1  [0B0?] 0B1",
        "rank 1   1F0   1F1   1B0   1B1",
    ]
    assert marked("0F0 0F1 0B0") == ["rank 0   0F0   0F1   0B0  [0B1?]"]


def test_all_who_wait_are_marked() -> None:
    assert marked("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1") == [
        "rank 0   0F0 [0B0] 0F1  0B1",
        "rank 1   1F0 [1F1] 1B0  1B1",
    ]


def test_without_a_place_nothing_is_marked() -> None:
    assert marked("0F0 0B0\n2F0 2B0") == ["rank 0   0F0  0B0", "rank 1   2F0  2B0"]
    assert broken(table("empty", [[]]), ScheduleError("empty")) == "rank 0"
