"""Timelines of steps: kept, written, read, shown."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel.pipeline import Kind
from hpcml.parallel.pipeline.step import PipelineStep
from hpcml.trace.events import events
from hpcml.trace.picture import draw, of_step
from hpcml.trace.record import Recorded, Recorder, RunRecorder, Trace, load
from hpcml.trace.segments import segments
from hpcml.trace.theory import theories
from tests.trace.support import recorded

BATCH = tuple(np.random.default_rng(0).integers(0, 13, (2, 4, 7)))


def step_on(sizes: dict[str, int], **options: Any) -> Any:
    mesh = Mesh(sizes)
    return hpcml.parallelize(
        GPT(13, 7, layers=3, heads=2, width=8), loss=NextTokenLoss(), mesh=mesh, microbatch=1,
        optimizer=hpcml.optim.AdamW, lr=1e-3, **options,
    )  # fmt: skip


def run(sizes: dict[str, int], ranks: int, **options: Any) -> list[Recorded]:
    def program() -> Recorded:
        step = step_on(sizes, **options)
        step(BATCH)
        recorder = Recorder(step.mesh)
        loss, own = recorder.record(lambda: step(BATCH))
        assert np.isfinite(loss) and step.mesh.ledger.timeline is None
        if isinstance(step, PipelineStep):
            lowered = step._program(4 // step.axis.size)
            assert [one[:3] for one in own.work if one.stage >= 0] == [
                (kind, stage, microbatch) for stage, kind, microbatch in lowered
            ]
        return own

    return hpcml.run(program, ranks=ranks)


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_a_pipeline_notes_what_its_schedule_says(schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    ranks = run({"pp": 2, "dp": 1}, 2, schedule=schedule, chunks=chunks)
    (found,) = theories(ranks)
    assert 0 < found.bubble < 1 and found.simulation.makespan > 0
    assert 0 < found.makespan <= max(r.end for r in ranks) - min(r.start for r in ranks)
    for rank, did in zip(ranks, segments(ranks), strict=True):
        edges = [rank.start, *(edge for one in did for edge in (one.start, one.end)), rank.end]
        assert edges == sorted(edges)
        kinds = Counter(work.kind for work in rank.work if work.stage < 0)
        assert kinds == {Kind.REDUCE: 1, Kind.UPDATE: 2}  # the norm and the update itself


def test_ranks_without_a_pipeline_note_their_microbatches() -> None:
    ranks = run({"dp": 2}, 2, zero=1)
    assert theories(ranks) == []
    for number, rank in enumerate(ranks):
        noted = [(work.kind, work.microbatch) for work in rank.work]
        assert noted == [("F", number), ("B", number), ("F", number + 2), ("B", number + 2),
                         ("reduce", -1), ("U", -1), ("U", -1)]  # fmt: skip
        assert {call.operation for call in rank.calls} >= {"reduce_scatter", "all_gather"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run of four ranks, two pipelines."""
    made = tmp_path_factory.mktemp("run")
    (made / "ranks").mkdir()

    def program() -> None:
        step = step_on({"pp": 2, "dp": 2})
        recorder = RunRecorder(step.mesh, 2, made / "ranks")
        for number in range(4):
            recorder.step(number, lambda: step(BATCH))
        recorder.write()
        recorder.write()

    hpcml.run(program, ranks=4)
    return made


def test_files_of_ranks_are_read_together(folder: Path) -> None:
    trace = load(folder)
    assert list(trace.steps) == [1, 2]
    assert [place.coords for place in trace.places] == [
        {"pp": pp, "dp": dp} for pp in (0, 1) for dp in (0, 1)
    ]
    for ranks in trace.steps.values():
        assert [rank.rank for rank in ranks] == [0, 1, 2, 3]
        assert len(theories(ranks)) == 2
    assert max(r.end for r in trace.steps[1]) <= min(r.start for r in trace.steps[2]) + 0.1


def test_events_nest_and_arrows_have_two_ends(folder: Path) -> None:
    trace = load(folder)
    found = json.loads(json.dumps(events(trace)))["traceEvents"]
    slices = [event for event in found if event["ph"] == "X"]
    assert min(event["ts"] for event in slices) == 0
    assert Counter(event["cat"] for event in slices if event["name"] == "step 1") == {"step": 4}
    for rank in range(4):
        rows = [e for e in slices if (e["pid"], e["tid"]) == (rank, 0)]
        rows.sort(key=lambda e: (e["ts"], -e["dur"]))
        open_until: list[float] = []
        for event in rows:
            end = event["ts"] + event["dur"]
            while open_until and event["ts"] >= open_until[-1] - 1e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3, event
            open_until.append(end)
    starts = Counter(event["id"] for event in found if event["ph"] == "s")
    ends = Counter(event["id"] for event in found if event["ph"] == "f")
    # Two steps of two pipelines of two microbatches: each there and back.
    assert starts == ends and set(starts.values()) == {1} and len(starts) == 2 * 2 * 2 * 2
    names = [e["args"]["name"] for e in found if e["name"] == "process_name"]
    assert len(names) == 4 and names[2].startswith("rank 2 (pp=1 dp=0) on ")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures(folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    panels = of_step(1, load(folder).steps[1])
    assert [len(panel.rows) for panel in panels] == [4, 2]
    draw(panels, str(tmp_path / f"x.{kind}"))
    made = (tmp_path / f"x.{kind}").read_bytes()
    assert made.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        for colour in (b"#4a7ebb", b"#4f9d4f", b"#8e63b0", b"#ef8a2c", b"#d5d5d5", b"#202020"):
            assert colour in made


def test_what_is_not_whole_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no timelines: name the"):
        load(tmp_path)
    copy = tmp_path / "ranks"
    copy.mkdir()
    for path in (folder / "ranks").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "trace-00002.json").unlink()
    with pytest.raises(UserError, match="timelines of 3 of 4 ranks"):
        load(tmp_path)
    (copy / "trace-00001.json").write_text("{")
    with pytest.raises(UserError, match="its timelines cannot be read"):
        load(tmp_path)


def test_nothing_is_kept_unless_asked(tmp_path: Path) -> None:
    recorder = RunRecorder(Mesh(), 0, tmp_path / "absent")
    assert recorder.step(1, lambda: 5) == 5
    recorder.write()
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_recording() -> None:
    mesh = Mesh()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError):
        Recorder(mesh).record(fail)
    assert mesh.ledger.timeline is None


def test_a_trace_of_nothing_but_steps_has_events() -> None:
    ranks = run({"dp": 1}, 1)
    found = events(Trace([], {1: ranks}))["traceEvents"]
    assert [event["name"] for event in found][:3] == ["step 1", "0F0", "0B0"]


def test_a_message_for_the_next_step_has_no_arrow() -> None:
    """Pipelines that are not emptied use it only then; half an arrow would lead nowhere."""
    first = recorded(0, {"pp": 0}, [("0F0", 0, 1), ("0sendF0", 1, 2), ("0F1", 2, 3),
                                    ("0sendF1", 3, 4)])  # fmt: skip
    second = recorded(1, {"pp": 1}, [("1F0", 2, 3)])
    found = events(Trace([], {1: [first, second]}))["traceEvents"]
    arrows = [(event["ph"], event["id"]) for event in found if event["name"] == "message"]
    assert arrows == [("s", "1.0sendF0"), ("f", "1.0sendF0")]
