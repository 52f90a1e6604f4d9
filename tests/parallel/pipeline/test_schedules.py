"""The schedules of the literature: golden tables, and what holds at any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpcml.errors import UserError
from hpcml.parallel.pipeline import SCHEDULES, Kind, Schedule, Weights, check, parse, versions
from hpcml.parallel.pipeline.schedules import (
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    zero_bubble,
)
from hpcml.parallel.pipeline.versions import held, staleness
from tests.parallel.pipeline.tables import SIZES, all_sizes, runs

# Written by hand from the figures of the papers.
GOLDEN = {
    "naive": (
        naive(3, 2),
        """
        0F0 0B0 0F1 0B1
        1F0 1B0 1F1 1B1
        2F0 2B0 2F1 2B1
        """,
    ),
    # GPipe, figure 2c, backward in increasing order
    "gpipe": (
        gpipe(4, 4),
        """
        0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
        1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3
        2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
        3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3
        """,
    ),
    # Megatron-LM 2021, figure 4, top
    "1f1b": (
        one_f_one_b(4, 8),
        """
        0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7
        1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7
        """,
    ),
    "1f1b, fewer microbatches than ranks": (
        one_f_one_b(4, 2),
        """
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
        3F0 3B0 3F1 3B1
        """,
    ),
    # The same, bottom: devices 1 to 4 with chunks of stages r and r + 4
    "interleaved": (
        interleaved(4, 8),
        """
        0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1 4F4 4B2 4F5 4B3 4F6 0B0 4F7 \
0B1 0B2 0B3 4B4 4B5 4B6 4B7 0B4 0B5 0B6 0B7
        1F0 1F1 1F2 1F3 5F0 5F1 5F2 5F3 1F4 5B0 1F5 5B1 1F6 5B2 1F7 5B3 5F4 1B0 5F5 1B1 5F6 \
1B2 5F7 1B3 5B4 5B5 5B6 5B7 1B4 1B5 1B6 1B7
        2F0 2F1 2F2 2F3 6F0 6F1 6F2 6B0 6F3 6B1 2F4 6B2 2F5 6B3 2F6 2B0 2F7 2B1 6F4 2B2 6F5 \
2B3 6F6 6B4 6F7 6B5 6B6 6B7 2B4 2B5 2B6 2B7
        3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 3F6 3B2 3F7 3B3 7F4 \
7B4 7F5 7B5 7F6 7B6 7F7 7B7 3B4 3B5 3B6 3B7
        """,
    ),
    # Zero bubble, figure 2
    "zero-bubble": (
        zero_bubble(4, 5),
        """
        0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4
        1F0 1F1 1F2 1I0 1F3 1I1 1W0 1F4 1I2 1W1 1I3 1W2 1I4 1W3 1W4
        2F0 2F1 2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2I4 2W2 2W3 2W4
        3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3W2 3W3 3W4
        """,
    ),
    # PipeDream, figure 4: an update after every backward
    "pipedream": (
        pipedream(3, 4),
        """
        weights: stashed
        0F0 0F1 0F2 0B0 0U0 0F3 0B1 0U1 0B2 0U2 0B3 0U3
        1F0 1F1 1B0 1U0 1F2 1B1 1U1 1F3 1B2 1U2 1B3 1U3
        2F0 2B0 2U0 2F1 2B1 2U1 2F2 2B2 2U2 2F3 2B3 2U3
        """,
    ),
    # PipeDream-2BW, figure 2, which has 4 workers and batches of 4
    "pipedream-2bw": (
        pipedream_2bw(4, 8),
        """
        weights: double
        0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0U3 0F7 0B4 0B5 0B6 0B7 0U7
        1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1U3 1F6 1B4 1F7 1B5 1B6 1B7 1U7
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2U3 2F5 2B4 2F6 2B5 2F7 2B6 2B7 2U7
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3U3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7 3U7
        """,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    made, text = GOLDEN[name]
    assert parse(text, made.name) == made


def test_at_all_sizes_tables_are_complete_and_run() -> None:
    for name, schedule in all_sizes():
        check(schedule)
        assert runs(schedule), schedule
        actions = [action for order in schedule.orders for action in order]
        passes = [action for action in actions if action.kind is not Kind.UPDATE]
        backward = 2 if name == "zero-bubble" else 1
        assert len(set(passes)) == len(passes)
        assert len(passes) == schedule.stages * schedule.microbatches * (1 + backward)
        for kind in Kind:
            for stage in range(schedule.stages):
                order = [m for s, k, m in actions if (s, k) == (stage, kind)]
                assert order == sorted(order), (schedule, kind)


def test_chunks_go_round_the_ranks() -> None:
    schedule = interleaved(2, 4, 3)
    check(schedule)
    assert schedule.rank_of == (0, 1, 0, 1, 0, 1)
    assert schedule.stages_of(1) == (1, 3, 5)


def test_pipedream_holds_the_versions_of_the_paper() -> None:
    """Stage s of n sees t - n + s + 1 at update t (from 0) and holds n - s versions."""
    for ranks, microbatches in SIZES:
        schedule = pipedream(ranks, microbatches)
        used, late = versions(schedule), staleness(schedule)
        for stage in range(ranks):
            for t in range(microbatches):
                assert used[stage, t] == max(0, t - (ranks - stage) + 1)
                assert late[stage, t] == min(t, ranks - stage - 1)
        for stage, count in enumerate(held(schedule)):
            assert count <= ranks - stage
            if microbatches >= 2 * (ranks - stage) - 1:  # the warm-up is over
                assert count == ranks - stage


def test_vertical_sync_has_all_stages_use_one_version() -> None:
    for ranks, microbatches in SIZES:
        schedule = pipedream(ranks, microbatches, vertical_sync=True)
        used = versions(schedule)
        assert used == {(s, t): max(0, t - ranks + 1) for s, t in used}
        assert len(used) == ranks * microbatches
        if microbatches >= 2 * ranks - 1:
            assert held(schedule) == (ranks,) * ranks
        assert set(staleness(schedule).values()) == set(range(min(ranks, microbatches)))


def test_2bw_is_one_update_late_and_holds_two_versions() -> None:
    for ranks in range(1, 7):
        for every in (max(1, ranks - 1), ranks, ranks + 3):
            for microbatches in (every, 3 * every, 3 * every + 1):
                schedule = pipedream_2bw(ranks, microbatches, every)
                check(schedule)
                batches = -(-microbatches // every)
                assert schedule.updates()[:-1] == [every * (t + 1) - 1 for t in range(batches - 1)]
                used = versions(schedule)
                assert used == {(s, m): max(0, m // every - 1) for s, m in used}
                assert held(schedule) == (min(batches, 2),) * ranks
                late = {min(m // every, 1) for m in schedule.updates()}
                assert set(staleness(schedule).values()) == late


def test_schedules_say_what_they_promise() -> None:
    promises = {name: make(2, 2).weights for name, make in SCHEDULES.items()}
    stale = {"pipedream": Weights.STASHED, "pipedream-2bw": Weights.DOUBLE}
    assert promises == dict.fromkeys(SCHEDULES, Weights.SYNCHRONOUS) | stale
    assert [name for name, make in SCHEDULES.items() if not make(2, 2).synchronous] == list(stale)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpipe(0, 4), "ranks=0: a schedule needs 1 or more"),
        (lambda: pipedream(2, 0), "microbatches=0: a schedule needs 1 or more"),
        (
            lambda: interleaved(4, 6),
            (
                "6 microbatches with schedule=interleaved on 4 ranks: use a multiple of 4, such as "
                "4 or 8, or 1f1b"
            ),
        ),
        (
            lambda: interleaved(4, 3),
            (
                "3 microbatches with schedule=interleaved on 4 ranks: use a multiple of 4, such as "
                "4, or 1f1b"
            ),
        ),
        (
            lambda: interleaved(4, 8, 1),
            "chunks=1 with schedule=interleaved: use 2 or more, or 1f1b",
        ),
        (
            lambda: pipedream_2bw(4, 8, 2),
            (
                "update_every=2 with schedule=pipedream-2bw on 4 ranks: a batch would begin "
                "before the weights it needs: use 3 or more"
            ),
        ),
        (lambda: pipedream_2bw(1, 8, 0), "use 1 or more"),
    ],
)
def test_what_a_schedule_cannot_do_is_one_line(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as raised:
        make()
    assert message in str(raised.value)
