"""`hpcml trace RUN_DIR`, and the runs that it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcml.cli import main
from tests.train.jobs import hpcml, metrics, write_job


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a traced run in a pipeline of two processes."""
    folder = tmp_path_factory.mktemp("job")
    job = write_job(folder, 4)
    done = hpcml(
        "train", job, f"run.dir={folder / 'run'}", "run.trace=2", "mesh.pp=2",
        "train.microbatch=2", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_in_a_pipeline(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(metrics(pipeline)) == 4
    assert main(["trace", str(pipeline)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2:"
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[4].startswith("pipeline of ranks 0, 1: ")
    assert lines[5] == f"{pipeline / 'trace.json'}: steps 1, 2, for ui.perfetto.dev"
    found = json.loads((pipeline / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in found}
    assert {"step 1", "step 2", "0F0", "1B2", "0sendF1", "U", "message"} <= names
    other = str(tmp_path / "one.json")
    assert main(["trace", str(pipeline), "--step", "1", "--json", other]) == 0
    assert capsys.readouterr().out.startswith("step 1:")
    names = {event["name"] for event in json.loads(Path(other).read_text())["traceEvents"]}
    assert "step 1" in names and "step 2" not in names


def test_a_picture(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, events = tmp_path / "x.svg", str(tmp_path / "x.json")
    assert main(["trace", str(pipeline), "--plot", str(path), "--json", events]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: step 2"
    assert "theory" in path.read_text()
    path = tmp_path / "x.docx"
    assert main(["trace", str(pipeline), "--plot", str(path), "--json", events]) == 2
    assert ".docx is no picture" in capsys.readouterr().err
    assert not path.exists()


def test_a_run_alone_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, folder = write_job(tmp_path, 3), tmp_path / "run"
    arguments = ["train", str(job), f"run.dir={folder}", "train.microbatch=2"]
    assert main([*arguments, "run.trace=2"]) == 0
    assert main(["trace", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[0] == "0" and "pipeline" not in "".join(lines)
    assert main([*arguments, "run.overwrite=true"]) == 0
    assert not (folder / "trace.json").exists()
    assert main(["trace", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f'hpcml: error: "{folder}" holds no timelines: name the run.dir of a run with run.trace '
        "above 0\n"
    )


def test_mistakes_are_one_line(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(pipeline), "--step", "7"], f'--step 7: "{pipeline}" holds timelines of 1, 2'),
        ([str(pipeline / "none")], "holds no timelines"),
        ([str(pipeline), "--json", "none/there.json"], "none/there.json cannot be written"),
    ):
        assert main(["trace", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_more_timelines_than_steps_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, 3)
    assert main(["train", str(job), f"run.dir={tmp_path / 'run'}", "run.trace=3"]) == 2
    error = capsys.readouterr().err
    assert "run.trace=3 with run.steps=3: the first step is not kept" in error
