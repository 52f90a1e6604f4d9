"""How the ranks of a test run talk to each other: on a communicator of their own."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

_OUTCOMES = ("passed", "skipped", "failed")
_PHASES = ("setup", "call", "teardown")


class LostStep(Exception):
    """The ranks cannot agree, since not all of them have come to the same point."""


@dataclass
class Verdict:
    """A failure told by every rank that has something to say, in the form that pytest prints."""

    stories: dict[str, str]
    """Ranks -> what they say."""
    message: str
    """The line of the summary."""
    reprcrash: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        self.reprcrash = SimpleNamespace(message=self.message)

    @staticmethod
    def text(report: pytest.TestReport) -> str:
        """A rank's failure with what the test printed there."""
        printed = [f"{f' {name} ':-^80}\n{text}" for name, text in report.sections if text]
        return "\n".join([report.longreprtext, *printed])

    def toterminal(self, writer: Any) -> None:
        """Print it."""
        for who, story in self.stories.items():
            writer.sep("- ", who, red=True, bold=True)
            writer.line(story)

    def __str__(self) -> str:
        return "\n".join(f"{who}: {story}" for who, story in self.stories.items())


class Alone:
    """A run without MPI: the same interface for one rank."""

    rank, size = 0, 1

    def share(self, make: Callable[[], str]) -> str:
        """What rank 0 makes, on every rank."""
        return make()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all."""

    def agree(self, report: pytest.TestReport, patience: float) -> Verdict | None:
        """The failure of this phase on any rank, None if all have passed or skipped it."""
        return None


class Ranks:
    """The ranks of the MPI world."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        self._round = 0

    def share(self, make: Callable[[], str]) -> str:
        """What rank 0 makes, on every rank."""
        return str(self._comm.bcast(make() if self.rank == 0 else None))

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        return list(self._comm.allgather(value))

    def barrier(self) -> None:
        """Wait for all."""
        self._comm.barrier()

    def agree(self, report: pytest.TestReport, patience: float) -> Verdict | None:
        """The failure of this phase on any rank, None if all have passed or all have skipped it.

        Outcomes that differ are a failure too: what one rank skips, the others cannot do together.
        Raises `LostStep` if the others do not come within `patience` seconds, or are elsewhere.
        """
        if self.size == 1:
            return None
        self._round += 1
        phase = _PHASES.index(report.when)
        outcome = _OUTCOMES.index(report.outcome)
        found = self._exchange(array("i", [self._round, phase, outcome]), patience)
        places = {tuple(found[3 * rank : 3 * rank + 2]) for rank in range(self.size)}
        if len(places) > 1:
            raise LostStep("the ranks have come to different phases of their tests")
        outcomes = [_OUTCOMES[code] for code in found[2::3]]
        if "failed" not in outcomes and len(set(outcomes)) == 1:
            return None
        return self._verdict(report, outcomes)

    def _exchange(self, mine: array[int], patience: float) -> array[int]:
        """All-gather that gives up: a blocking one could wait for ever, without a word."""
        found = array("i", [0] * (len(mine) * self.size))
        request = self._comm.Iallgather([mine, self._mpi.INT], [found, self._mpi.INT])
        started, pause = time.monotonic(), 1e-4
        while not request.Test():
            if time.monotonic() - started > patience:
                raise LostStep(
                    f"rank {self.rank} has failed, and not all others have finished this test "
                    f"within {patience:g} s"
                )
            time.sleep(pause)  # cores may be fewer than ranks: leave them to those who still work
            pause = min(1.5 * pause, 5e-3)
        return found

    def _verdict(self, report: pytest.TestReport, outcomes: list[str]) -> Verdict:
        """What each rank says, equal stories told once; the same on all ranks."""
        failed = report.outcome == "failed"
        crash = getattr(report.longrepr, "reprcrash", None)
        message = getattr(crash, "message", None) or report.longreprtext.strip()
        message = message.partition("\n")[0]
        said = self.gather((Verdict.text(report) if failed else f"{report.outcome}", message))
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, (text, line) in enumerate(said):
            key = (outcomes[rank], line if outcomes[rank] == "failed" else text)
            groups.setdefault(key, []).append(rank)
        stories = {_names(ranks): said[ranks[0]][0] for ranks in groups.values()}
        if "failed" in outcomes:
            first = next(ranks for (outcome, _), ranks in groups.items() if outcome == "failed")
            return Verdict(stories, f"{_names(first)}: {said[first[0]][1]}")
        return Verdict(stories, f"skipped on {outcomes.count('skipped')} of {self.size} ranks only")


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
