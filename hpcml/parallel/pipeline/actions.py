"""A pipeline as data: actions, and the schedule that orders them on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hpcml.errors import UserError


class Kind(StrEnum):
    """What an action does; the values are how it is written."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward: gradients of the stage's input and of its weights."""
    INPUT = "I"
    """Backward for the input alone, for which the stage before waits (Qi et al. 2023)."""
    WEIGHT = "W"
    """Backward for the weights, for which nobody waits: the other half of BACKWARD."""
    UPDATE = "U"
    """New weights of a stage from its gradients since the last update (asynchronous schedules)."""

    SEND_F = "sendF"
    """Send a stage's output on to the next stage."""
    RECV_F = "recvF"
    """Receive a stage's input."""
    SEND_B = "sendB"
    """Send the gradient of a stage's input back to the stage before."""
    RECV_B = "recvB"
    """Receive the gradient of a stage's output."""
    UNSHARD = "unshard"
    """Gather a stage's weights (stage 3 of ZeRO)."""
    RESHARD = "reshard"
    """Let the weights of the others go again."""
    REDUCE = "reduce"
    """A stage's gradients are complete: reduce them over the data-parallel ranks."""
    RELEASE = "release"
    """Let go what forward of a microbatch has kept."""


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT, Kind.UPDATE)
"""The kinds of which schedules consist; `hpcml.parallel.pipeline.lowering` adds the others."""
SENDS = (Kind.SEND_F, Kind.SEND_B)
RECEIVES = (Kind.RECV_F, Kind.RECV_B)

_OTHER_END = {
    Kind.SEND_F: (1, Kind.RECV_F),
    Kind.RECV_F: (-1, Kind.SEND_F),
    Kind.SEND_B: (-1, Kind.RECV_B),
    Kind.RECV_B: (1, Kind.SEND_B),
}


class Action(NamedTuple):
    """One cell of a schedule, written as stage, kind, microbatch: `2F5`.

    Kinds that belong to a stage as a whole carry the microbatch of the action they stand beside.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def partner(self) -> Action:
        """Of a send its receive, of a receive its send; `rank_of` its stage is the peer."""
        step, kind = _OTHER_END[self.kind]
        return Action(self.stage + step, kind, self.microbatch)


class Weights(StrEnum):
    """Which weights a microbatch sees; all but the first are for schedules with updates."""

    SYNCHRONOUS = "synchronous"
    """The same for all microbatches of the table; the update comes after it."""
    STASHED = "stashed"
    """The newest at forward, and the same at backward (PipeDream 2019, section 3.3)."""
    VERTICAL = "vertical"
    """On all stages the version that was the newest on the first one (vertical sync, ibid.)."""
    DOUBLE = "double"
    """Of batch t, which ends in update t, version t - 1 (PipeDream-2BW 2021, section 3.1)."""


@dataclass(frozen=True)
class Schedule:
    """The actions of each rank in the order in which it runs them: use `table` to make one."""

    name: str
    orders: tuple[tuple[Action, ...], ...]
    """For each rank its actions."""
    rank_of: tuple[int, ...]
    """For each stage its rank; -1: no rank has it."""
    microbatches: int
    weights: Weights = Weights.SYNCHRONOUS

    @property
    def ranks(self) -> int:
        """How many ranks it is for."""
        return len(self.orders)

    @property
    def stages(self) -> int:
        """Into how many parts it cuts a model."""
        return len(self.rank_of)

    @property
    def synchronous(self) -> bool:
        """Whether losses and gradients are those of serial training."""
        return self.weights is Weights.SYNCHRONOUS

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank: one, or its chunks."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)

    def updates(self) -> list[int]:
        """The microbatches after which the first stage makes an update, in increasing order."""
        cells = self.orders[self.rank_of[0]]
        return sorted(m for stage, kind, m in cells if (stage, kind) == (0, Kind.UPDATE))

    def __str__(self) -> str:
        weights = self.weights if self.synchronous else f"weights {self.weights}"
        return (
            f"{self.name}: {_count(self.ranks, 'rank')}, {_count(self.stages, 'stage')}, "
            f"{_count(self.microbatches, 'microbatch', 'es')}, {weights}"
        )


def table(
    name: str,
    orders: Iterable[Iterable[Action]],
    weights: Weights = Weights.SYNCHRONOUS,
) -> Schedule:
    """A schedule from the actions of each rank.

    Stages and microbatches are as many as the actions name; a stage is on the rank that has most of
    its actions, so that a single one elsewhere is found to be the mistake.
    """
    cells = tuple(tuple(order) for order in orders)
    counts = Counter((a.stage, rank) for rank, order in enumerate(cells) for a in order)
    owner: dict[int, int] = {}
    for stage, rank in sorted(counts):
        if stage not in owner or counts[stage, rank] > counts[stage, owner[stage]]:
            owner[stage] = rank
    rank_of = tuple(owner.get(stage, -1) for stage in range(max(owner, default=-1) + 1))
    microbatches = 1 + max((a.microbatch for order in cells for a in order), default=-1)
    return Schedule(name, cells, rank_of, microbatches, weights)


class ScheduleError(UserError):
    """A schedule that is wrong, with the place for whoever draws it.

    cells: (rank, index in its order) of what is wrong. absent: what is missing, and the rank and
    index before which it was expected. Indices count from 0, cells in messages from 1.
    """

    def __init__(
        self,
        message: str,
        cells: Iterable[tuple[int, int]] = (),
        absent: tuple[int, int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.cells, self.absent = frozenset(cells), absent


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
