"""The benchmark of pipelines: its formulas, what it measures, and the peer's same computation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import hpcml
from hpcml.bench import pipeline, pipeline_show, step
from hpcml.cli import bench_pipeline, main
from hpcml.comm import Mesh
from hpcml.comm.guard import agree
from hpcml.errors import UserError
from hpcml.parallel.pipeline import Costs, find, lower, simulate

TINY = step.Size(4, 2, 16, 8, 3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.SIZES, "small", TINY)
    monkeypatch.setattr(pipeline, "_RECORDED", 3)


def measured(
    schedules: Any = bench_pipeline.SCHEDULES, peer: str = "", microbatches: int = 4
) -> Any:
    return pipeline.run(Mesh(), ["small"], schedules, microbatches, peer, rounds=1)


def check(report: dict[str, Any]) -> None:
    assert (report["bench"], report["version"], report["microbatches"]) == ("pipeline", 1, 4)
    assert [row["schedule"] for row in report["rows"]] == list(bench_pipeline.SCHEDULES)
    for row in report["rows"]:
        assert row["size"] == "(4, 16, 8, 4)"  # a batch of as many samples as microbatches
        assert row["ours"] > 0 and 0 < row["bubble"] < 1 and 0 < row["simulated"] < 1
        assert row["of_simulated"] > 0 and row["makespan"] > 0
        stages = 4 if row["schedule"] == "interleaved" else 2
        back = ["I", "W"] if row["schedule"] == "zero-bubble" else ["B"]
        assert set(row["stages"]) == {f"{s}{k}" for s in range(stages) for k in ["F", *back]}
        assert len(row["activations"]) == 2 and min(row["activations"]) > 0
    kept = {row["schedule"]: row["kept"] for row in report["rows"]}
    assert (kept["naive"], kept["gpipe"], kept["1f1b"]) == ([1, 1], [4, 4], [2, 1])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", bench_pipeline.SCHEDULES)
def test_the_formulas_are_the_simulators(schedule: str, ranks: int) -> None:
    costs = Costs.parse("F=1,B=2,I=1,W=1")
    found = simulate(lower(find(schedule, ranks, 8)), costs).bubble
    assert pipeline.formula(schedule, ranks, 8) == pytest.approx(found)
    assert pipeline.formula("pipedream", ranks, 8) is None


def test_every_schedule(tmp_path: Path) -> None:
    (report, drawn), (other, _) = hpcml.run(measured, ranks=2)
    check(report)
    assert report == other  # the slowest rank counts for all
    assert "beside" not in report["rows"][0]
    text = pipeline_show.table(report)
    assert text.count("zero-bubble") == 2 and "torch" not in text
    pytest.importorskip("matplotlib")
    pipeline_show.plot(report, drawn, str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_that_is_not_emptied_is_filled_and_drained_around_its_batches() -> None:
    report, (theory,) = hpcml.run(lambda: measured(["pipedream"]), ranks=2)[0]
    (row,) = report["rows"]
    assert (row["batches"], row["formula"], row["kept"]) == (2, None, [2, 1])
    assert set(row["stages"]) == {f"{stage}{kind}" for stage in (0, 1) for kind in "FBU"}
    events = [event.action for event in theory.simulation.events[1]]
    assert [a.microbatch for a in events if a.kind == "U"] == list(range(8))
    assert "2 batches" in pipeline_show.table(report)


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_peer_computes_the_same_step() -> None:
    mesh = Mesh()
    pytest.importorskip("torch")
    if mesh.size != 2:
        pytest.skip("a model of four stages, two of each rank")
    report, _ = measured(peer="torch")
    check(report)
    for row in report["rows"]:
        assert ("ratio" in row) == (row["schedule"] in ("gpipe", "1f1b", "interleaved"))
        if "ratio" in row:
            assert row["loss_difference"] < 1e-5 and row["peer"] > 0, row
    text = agree(mesh.world, lambda: pipeline_show.table(report))
    assert "cannot run" not in text and "torch ms" in text


def test_what_the_peer_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("hpcml.bench.torch_pipeline")

    def fail(*_: Any) -> Any:
        raise NotImplementedError("gloo has no such call\nand more")

    monkeypatch.setattr(peer, "step", fail)
    made = hpcml.run(lambda: pipeline.measure(Mesh(), TINY, ["1f1b"], 3, "torch", 1, 1), ranks=2)
    ((row, _),) = made[0]
    assert (row["beside"], row["cannot_run"]) == ("Schedule1F1B", "gloo has no such call")
    assert "ratio" not in row and row["ours"] > 0


def test_started_alone_it_starts_a_job(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pipeline", "--schedules", "1f2b"]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("hpcml: error: --schedules 1f2b: use naive, gpipe, ")
    assert shown.err.count("\n") == 1 and not shown.out
    assert main(["bench", "pipeline", "--ranks", "1"]) == 2
    assert "communication needs 2 ranks or more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--microbatches", "0"], "--microbatches 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--peer", "tensor"], '--peer="tensor" is unknown'),
        (["--plot", "none/there.png"], "none/there.png cannot be written"),
        ([], "a pipeline of 1 rank: start 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str) -> None:
    parser = argparse.ArgumentParser()
    bench_pipeline.add_options(parser)
    with pytest.raises(UserError, match=said):
        bench_pipeline.measure(parser.parse_args(arguments))
