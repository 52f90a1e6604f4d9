"""What a rank did when: pieces of work, and the communication within and between them.

Seconds are those of `time.perf_counter`, of which each node has its own; `offset` says how far a
rank's is from that of the first rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from hpcml.comm.axis import Axis

clock = time.perf_counter

_ROUNDS = 32
"""Questions to the first rank's clock: the fastest answer tells most."""


class Work(NamedTuple):
    """A piece of a training step."""

    kind: str
    """As `hpcml.parallel.pipeline.Kind` writes it."""
    stage: int
    """Of a pipeline; -1: of the whole rank."""
    microbatch: int
    """-1: of all."""
    start: float
    end: float


class Call(NamedTuple):
    """A collective, or a wait for a message (`send`, `recv`)."""

    operation: str
    axis: str
    bytes: int
    """Of this rank's array; 0 where that says nothing."""
    background: bool
    """Whether a communication thread made it, beside the work."""
    start: float
    end: float


class Timeline:
    """Notes of one rank; a mesh keeps them while its `ledger.timeline` is one."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.calls: list[Call] = []
        self._inside = False

    @contextmanager
    def span(self, kind: str, stage: int = -1, microbatch: int = -1) -> Iterator[None]:
        """Within, the rank does a piece of work; a piece of a piece is not noted."""
        if self._inside:
            yield
            return
        self._inside, start = True, clock()
        try:
            yield
        finally:
            self._inside = False
            self.work.append(Work(kind, stage, microbatch, start, clock()))


def offset(axis: Axis) -> tuple[float, float]:
    """Seconds from this rank's clock to that of the first one, and by how much they may be wrong.

    Each rank asks the first one for the time, several times. Between question and answer it reads
    its own clock twice; the first rank's reading was somewhere between, at half of the shortest
    round trip at best (Cristian 1989, "Probabilistic clock synchronization"). Collective.
    """
    answer = np.zeros(1)
    found = 0.0, 0.0
    for rank in range(1, axis.size):
        if axis.rank == 0:
            for _ in range(_ROUNDS):
                axis.recv(answer, rank)
                axis.send(np.array([clock()]), rank)
        elif axis.rank == rank:
            found = 0.0, math.inf
            for _ in range(_ROUNDS):
                asked = clock()
                axis.send(answer, 0)
                axis.recv(answer, 0)
                half = (clock() - asked) / 2
                if half < found[1]:
                    found = float(answer[0]) - (asked + half), half
    return found
