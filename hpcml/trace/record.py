"""Timelines of steps: kept by each rank, written into a file of its own, read together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hpcml.comm import Mesh
from hpcml.comm.timeline import Call, Timeline, Work, clock, offset
from hpcml.errors import UserError

T = TypeVar("T")

VERSION = 1
"""Of the files' format."""


class Place(NamedTuple):
    """A rank and its clock."""

    host: str
    coords: Mapping[str, int]
    """In the mesh, by axis."""
    offset: float
    """Seconds from its clock to that of the first rank."""
    uncertainty: float
    """By how many seconds that may be wrong."""


@dataclass(frozen=True)
class Recorded:
    """What one rank did in a step; times in seconds of the first rank's clock."""

    rank: int
    coords: Mapping[str, int]
    start: float
    end: float
    work: Sequence[Work]
    """In the order of time, as the calls."""
    calls: Sequence[Call]


@dataclass(frozen=True)
class Trace:
    """The timelines of all ranks."""

    places: Sequence[Place]
    steps: Mapping[int, Sequence[Recorded]]
    """By number of the step, what each rank did."""


class Recorder:
    """Keeps the timelines of one rank."""

    def __init__(self, mesh: Mesh) -> None:
        """Compares the clock with the first rank's. Collective."""
        self._mesh = mesh
        self.place = Place(mesh.node.host, mesh.coords, *offset(mesh.world))

    def record(self, call: Callable[[], T]) -> tuple[T, Recorded]:
        """Make a call; what it returns, and what this rank did meanwhile."""
        mesh, (_, coords, shift, _) = self._mesh, self.place
        timeline, start = Timeline(), clock()
        mesh.ledger.timeline = timeline
        try:
            made = call()
        finally:
            mesh.ledger.timeline = None
        end = clock()
        work = [w._replace(start=w.start + shift, end=w.end + shift) for w in timeline.work]
        calls = [c._replace(start=c.start + shift, end=c.end + shift) for c in timeline.calls]
        return made, Recorded(mesh.rank, coords, start + shift, end + shift, work, calls)


class RunRecorder:
    """Keeps the timelines of a run's steps from the second on: the first one compiles kernels."""

    def __init__(self, mesh: Mesh, steps: int, folder: Path) -> None:
        """steps: how many to keep. folder: that of the ranks' files. Collective."""
        self._mesh, self._last = mesh, steps
        self._path = folder / f"trace-{mesh.rank:05}.json"
        self._recorder = Recorder(mesh) if steps else None
        self._kept: dict[int, Recorded] = {}

    def step(self, number: int, call: Callable[[], T]) -> T:
        """Make a step, and keep its timeline if it is one of those."""
        if self._recorder is None or not 1 <= number <= self._last:
            return call()
        made, self._kept[number] = self._recorder.record(call)
        return made

    def write(self) -> None:
        """Write what was kept, once. Raises UserError where the disk is full."""
        if self._recorder is None or not self._kept:
            return
        record = {
            "version": VERSION, "rank": self._mesh.rank, "ranks": self._mesh.size,
            "place": self._recorder.place._asdict(),
            "steps": {
                number: {"start": one.start, "end": one.end, "work": one.work, "calls": one.calls}
                for number, one in self._kept.items()
            },
        }  # fmt: skip
        self._kept = {}
        try:
            self._path.write_text(json.dumps(record))
        except OSError as error:
            raise UserError(
                f'"{self._path}" cannot be written ({error.strerror}): make room there, or set '
                "run.trace=0"
            ) from None


def load(folder: Path) -> Trace:
    """Read the files of all ranks of a run. Raises UserError where there are none, or not all."""
    paths = sorted((folder / "ranks").glob("trace-*.json"))
    if not paths:
        raise UserError(
            f'"{folder}" holds no timelines: name the run.dir of a run with run.trace above 0'
        )
    try:
        records = [json.loads(path.read_text()) for path in paths]
        ranks = records[0]["ranks"]
        places = [Place(**record["place"]) for record in records]
        steps: dict[int, list[Recorded]] = {}
        for record, place in zip(records, places, strict=True):
            for number, step in record["steps"].items():
                one = _recorded(record["rank"], place.coords, **step)
                steps.setdefault(int(number), []).append(one)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'"{folder}": its timelines cannot be read ({type(error).__name__} {error}): run again '
            "with run.trace above 0"
        ) from None
    if len(paths) != ranks:
        raise UserError(
            f'"{folder}" holds timelines of {len(paths)} of {ranks} ranks: copy the others\' '
            "files (ranks/trace-*.json) there"
        )
    return Trace(places, steps)


def _recorded(
    rank: int, coords: Mapping[str, int], *, start: float, end: float, work: Any, calls: Any
) -> Recorded:
    every = [Work(*one) for one in work], [Call(*one) for one in calls]
    return Recorded(rank, coords, start, end, *every)
