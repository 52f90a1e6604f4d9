"""`hpcml check` and `hpcml train` with images that ranks divide."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcml.train.verdict import Report
from tests.train.jobs import hpcml
from tests.train.test_check import report_of

cases = pytest.mark.parametrize
JOB = """
[data]
kind = "tests.train.pictures:pictures"
[model]
kind = "tests.train.pictures:{model}"
[train]
global_batch = 4
[optim]
grad_clip = 0.5
[loss]
kind = "cross_entropy"
"""


def check(folder: Path, model: str, *overrides: str) -> Report:
    (folder / "job.toml").write_text(JOB.format(model=model))
    pixels = ["data.by_pixel=true"] if model in ("Pixels", "Mistaken") else []
    return report_of(folder / "job.toml", *pixels, *overrides)


@cases(
    ("model", "overrides"),
    [
        ("Classifier", "mesh.sp_w=2"),
        ("Divided", "mesh.sp_h=2 zero.stage=2"),
        ("Pixels", "mesh.sp_h=3"),
        ("Styled", "mesh.sp_h=3"),
        ("Divided", "mesh.sp_h=2 mesh.sp_w=2 train.microbatch=2"),
        ("Pixels", "mesh.dp=2 mesh.sp_w=2 zero.stage=3"),
    ],
)
def test_healthy_runs_agree(tmp_path: Path, model: str, overrides: str) -> None:
    report = check(tmp_path, model, *overrides.split())
    assert report.first is None and report.steps == 2
    for layer in report.layers:
        assert layer.forward is not None and layer.backward is not None, layer.name
        assert max(layer.forward, layer.backward, layer.gradient or 0) < 1e-11, layer


def test_a_layer_that_takes_a_block_for_the_whole_is_found(tmp_path: Path) -> None:
    report = check(tmp_path, "Mistaken", "mesh.sp_h=2")
    assert report.first is not None
    assert (report.first.stage, report.first.layer) == ("forward", "blur")


def test_train_under_mpi(tmp_path: Path) -> None:
    """From the configuration to the results, every rank with its part of the images."""
    (tmp_path / "job.toml").write_text(JOB.format(model="Classifier"))
    run = ["run.steps=2", "run.log_every=0", f"run.dir={tmp_path}/runs"]
    done = hpcml("train", tmp_path / "job.toml", "mesh.sp_h=2", *run, ranks=2)
    assert done.returncode == 0, done.stderr
    assert '"halo"' in (tmp_path / "runs" / "metrics.jsonl").read_text()
