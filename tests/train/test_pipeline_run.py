"""`hpcml train` with pipelines: results of one rank, and mistakes said before anything runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpcml.comm.threads import run
from hpcml.train import config as configuration
from hpcml.train.loop import train
from tests.train.jobs import hpcml, metrics, summary, write_job
from tests.train.test_tensor_run import go, same

MICRO = "train.microbatch=1"


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("serial"), "serial")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["mesh.pp=2", MICRO]),
        (3, ["mesh.pp=3", "pipeline.schedule=zero-bubble", MICRO, "zero.stage=3"]),
        (2, ["mesh.pp=2", "pipeline.schedule=interleaved", "train.microbatch=3"]),
        (4, ["mesh.pp=2", "mesh.tp=2", "pipeline.schedule=gpipe", MICRO]),
        (3, ["mesh.pp=3", "pipeline.balance=measured", MICRO]),
        (4, ["mesh.pp=2", 'pipeline.stages=["transformer.h.1"]', "zero.stage=2", MICRO]),
    ],
    ids=str,
)
def test_results_are_those_of_one_rank(
    serial: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    found = go(tmp_path, "parallel", *overrides, ranks=ranks)
    same(found, serial)
    record = metrics(found)[0]
    assert record["comm"]["pp"]["send"]["bytes"] > 0
    if "zero.stage=3" not in overrides:  # a stage has some of it
        assert (
            record["memory"]["params"]["max"] < 0.7 * metrics(serial)[0]["memory"]["params"]["max"]
        )


def test_the_same_bits_in_stages(tmp_path: Path) -> None:
    options = ["run.deterministic=true", MICRO]
    hashes = {
        summary(go(tmp_path, name, *options, *more, ranks=ranks))["param_hash"]
        for name, ranks, more in [
            ("serial", 1, []),
            ("two", 2, ["mesh.pp=2"]),
            ("four", 4, ["mesh.pp=2", "zero.stage=2", "pipeline.schedule=zero-bubble"]),
        ]
    }
    assert len(hashes) == 1


def test_asynchronous_schedules(tmp_path: Path) -> None:
    """Records, validation and weights as of any run, the same each time; a step is a batch."""
    options = ["mesh.pp=2", MICRO, "model.tie_embeddings=false", "optim.grad_clip=0"]
    ways = {
        "stashed": ["pipeline.schedule=pipedream"],
        "again": ["pipeline.schedule=pipedream"],
        "vertical": ["pipeline.schedule=pipedream", "pipeline.vertical_sync=true"],
        "double": ["pipeline.schedule=pipedream-2bw"],
    }
    hashes = {}
    for name, way in ways.items():
        found = go(tmp_path, name, *options, *way, ranks=2)
        records, end = metrics(found), summary(found)
        assert [record["step"] for record in records] == [0, 1, 2, 3] and end["steps"] == 4
        assert all(
            math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm")
        )
        assert [number for number, r in enumerate(records) if "val_loss" in r] == [1, 3]
        assert end["val_loss"] < math.log(14) and end["exit"] == "completed"
        hashes[name] = end["param_hash"]
    assert hashes["stashed"] == hashes["again"] and len(set(hashes.values())) == 3


def test_under_mpiexec_a_sample_is_shown(tmp_path: Path) -> None:
    """All stages make it together."""
    job = write_job(tmp_path)
    done = hpcml("train", job, "mesh.pp=2", "train.microbatch=2", "run.log_every=2", ranks=2,
                 cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A sample:" in done.stdout and "pp(2)" in done.stdout
    again = hpcml("sample", tmp_path / "runs" / "job", "--prompt", "to be", "--tokens", "20")
    assert again.returncode == 0 and again.stdout.startswith("to be")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pipeline.schedule=interleaved", "train.microbatch=2"], ["3 microbatches", "multiple"]),
        (["pipeline.offload_dir=nowhere", "pipeline.activations=offload"], ["nowhere", "room"]),
        (["pipeline.schedule=1f2b"], ["1f2b", "did you mean"]),
        (["pipeline.chunks=9", "pipeline.schedule=interleaved"], ["18 stages", "mesh.pp"]),
        (['pipeline.stages=["transformer.h.7"]'], ["transformer.h.7", "no link"]),
        (["pipeline.schedule=pipedream", "optim.grad_clip=0"], ["transformer.wte", "untie"]),
        (["pipeline.schedule=pipedream-2bw"], ["grad_clip=1.0", "grad_clip=0"]),
        (["pipeline.vertical_sync=true"], ["vertical_sync", "pipedream"]),
        (["pipeline.schedule=nowhere.txt"], ["nowhere.txt", "unknown"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_on_every_rank(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    config = configuration.load(write_job(tmp_path), [f"run.dir={tmp_path / 'r'}", "mesh.pp=2",
                                                      *overrides])  # fmt: skip

    def program() -> str:
        try:
            train(config)
        except Exception as error:  # noqa: BLE001 (whatever it is)
            return f"{type(error).__name__}: {error}"
        return ""

    said = run(program, ranks=2)
    assert said == [said[0]] * 2 and said[0].startswith("UserError: "), said
    assert "\n" not in said[0] and all(word in said[0] for word in words), said[0]
    assert not (tmp_path / "r").exists()
