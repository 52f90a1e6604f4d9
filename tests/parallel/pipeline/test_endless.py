"""Parts of tables without an end, put together, are the table of one long run."""

from __future__ import annotations

from functools import partial

import pytest

from hpcml.parallel.pipeline import Kind, Schedule, check, find, versions
from hpcml.parallel.pipeline.actions import COMPUTE, RECEIVES, SENDS
from hpcml.parallel.pipeline.endless import Endless, Part
from hpcml.parallel.pipeline.lowering import add_messages, add_releases
from tests.parallel.pipeline.tables import meets

RULES: dict[str, dict[str, int]] = {
    "pipedream": {},
    "vertical": {"vertical_sync": True},
    "2bw": {},
}
FEEDS = [[1], [4], [1, 1, 1, 1, 1, 1, 1], [3, 1, 2, 5, 1], [7, 7, 7]]


def make(rule: str, ranks: int, every: int, total: int) -> Schedule:
    if rule == "2bw":
        return find("pipedream-2bw", ranks, total, update_every=every)
    return find("pipedream", ranks, total, **RULES[rule])


def cut(rule: str, ranks: int, feed: list[int]) -> tuple[list[Part], Schedule]:
    """The parts of a run that takes in so many microbatches a call, and the table of the run."""
    every = feed[0] if rule == "2bw" else 1
    endless = Endless(partial(make, rule, ranks, every), every)
    ends = [sum(feed[:number]) for number in range(len(feed))]
    parts = [endless.part(done, more) for done, more in zip(ends, feed, strict=True)]
    return [*parts, endless.part(sum(feed), 0)], make(rule, ranks, every, sum(feed))


def fits(rule: str, ranks: int, feed: list[int]) -> bool:
    return rule != "2bw" or (len(set(feed)) == 1 and feed[0] >= ranks - 1)


CASES = [(rule, ranks, feed) for rule in RULES for ranks in range(1, 6) for feed in FEEDS
         if fits(rule, ranks, feed)]  # fmt: skip


@pytest.mark.parametrize(("rule", "ranks", "feed"), CASES, ids=str)
def test_parts_make_one_long_table(rule: str, ranks: int, feed: list[int]) -> None:
    """With its versions; and each ends with the forward of its last microbatch on every rank."""
    parts, whole = cut(rule, ranks, feed)
    check(whole)
    for rank, order in enumerate(whole.orders):
        pieces = [[a for a in part.actions(rank) if a.kind in COMPUTE] for part in parts]
        assert tuple(action for piece in pieces for action in piece) == order
        for number, piece in enumerate(pieces[:-1], 1):
            assert piece[-1] == (rank, Kind.FORWARD, sum(feed[:number]) - 1)
    used = {
        (stage, m): version
        for part in parts for stage in range(ranks) for m, version in part.versions(stage).items()
    }  # fmt: skip
    assert used == versions(whole)


@pytest.mark.parametrize(("rule", "ranks", "feed"), CASES, ids=str)
def test_each_part_receives_what_it_sends(rule: str, ranks: int, feed: list[int]) -> None:
    """Even if a send waits for its receive; and nothing is sent twice or released twice."""
    parts, whole = cut(rule, ranks, feed)
    for part in parts:
        assert meets(part.schedule)
        every = [action for order in part.schedule.orders for action in order]
        sent = {action.partner for action in every if action.kind in SENDS}
        assert sent == {action for action in every if action.kind in RECEIVES}
    lowered = add_releases(add_messages(whole))
    for rank, order in enumerate(lowered.orders):
        assert sorted(a for part in parts for a in part.actions(rank)) == sorted(order)


def test_golden() -> None:
    """Two stages: a call begins with the backward that has waited, and ends like the one before."""
    parts, _ = cut("pipedream", 2, [2, 2])
    assert [" ".join(map(str, part.actions(rank))) for part in parts for rank in range(2)] == [
        "0F0 0sendF0 0F1 0sendF1 0recvB0",
        "1recvF0 1F0 1recvF1 1B0 1sendB0 1release0 1U0 1F1",
        "0B0 0release0 0recvB1 0U0 0F2 0sendF2 0B1 0release1 0U1 0F3 0sendF3 0recvB2",
        "1B1 1sendB1 1release1 1U1 1recvF2 1F2 1B2 1recvF3 1sendB2 1release2 1U2 1F3",
        "0B2 0release2 0recvB3 0U2 0B3 0release3 0U3",
        "1B3 1sendB3 1release3 1U3",
    ]
