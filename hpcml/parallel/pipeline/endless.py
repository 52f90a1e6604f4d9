"""Tables without an end, in parts: what ranks do while a batch comes in.

A schedule with updates goes on from batch to batch without being emptied. Its table is then that of
one long run, of which a part ends on every rank with the forward of a batch's last microbatch, and
the next one goes on from there. All that a part sends is received in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from hpcml.parallel.pipeline.actions import Action, Kind, Schedule
from hpcml.parallel.pipeline.check import check
from hpcml.parallel.pipeline.lowering import add_messages, add_releases
from hpcml.parallel.pipeline.versions import Place, versions


@dataclass(frozen=True)
class Part:
    """Some actions of a long run, in which they have other numbers."""

    schedule: Schedule
    """The actions, lowered."""
    used: Mapping[Place, int]
    """The versions of the weights that the microbatches which come in use."""
    microbatches: int = 0
    """By how much those of the run are higher."""
    updates: int = 0
    """By how much the versions are."""

    def actions(self, rank: int) -> list[Action]:
        """What a rank does, with the numbers of the run."""
        order = self.schedule.orders[rank]
        return [a._replace(microbatch=a.microbatch + self.microbatches) for a in order]

    def versions(self, stage: int) -> dict[int, int]:
        """For the microbatches that come in the versions of a stage, with the numbers of the run.

        A version is the number of updates that a stage has made since the run began.
        """
        return {
            m + self.microbatches: version + self.updates
            for (at, m), version in self.used.items()
            if at == stage
        }


class Endless:
    """A schedule with updates for as many microbatches as there will be."""

    def __init__(self, make: Callable[[int], Schedule], every: int) -> None:
        """make: the table of so many microbatches. every: microbatches an update.

        Tables must begin alike, and what follows on `ranks` microbatches must repeat itself with
        each update, as 1F1B does.
        """
        self._make, self.every = make, every
        self._ahead = -(-make(1).ranks // every) * every
        """From so many microbatches on a table is as it was an update before."""
        self._cut = cache(self._cut_out)

    def part(self, done: int, more: int) -> Part:
        """What ranks do when `more` microbatches follow on `done`; with 0 of them, until all ends.

        `done` must be a multiple of the microbatches of an update. Raises UserError for what the
        schedule does not take.
        """
        assert done % self.every == 0
        ahead = min(done, self._ahead)
        return replace(
            self._cut(ahead, more),
            microbatches=done - ahead, updates=(done - ahead) // self.every,
        )  # fmt: skip

    def _cut_out(self, done: int, more: int) -> Part:
        whole = self._make(done + more)
        check(whole)
        before: list[Action] = []
        now: list[tuple[Action, ...]] = []
        for order in whole.orders:
            start = _behind(order, done)
            before += order[:start]
            now.append(order[start : _behind(order, done + more) if more else None])
        part = add_releases(add_messages(replace(whole, orders=tuple(now)), before))
        used = {place: n for place, n in versions(whole).items() if place[1] >= done}
        return Part(part, used)


def _behind(order: tuple[Action, ...], microbatches: int) -> int:
    """The place behind the last forward of so many microbatches."""
    forwards = enumerate(order, 1)
    return max(
        (place for place, (_, kind, m) in forwards if kind is Kind.FORWARD and m < microbatches),
        default=0,
    )
