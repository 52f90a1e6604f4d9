"""`hpcml train` with tensor, sequence and context parallelism: results of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpcml.comm.threads import run
from hpcml.train import config as configuration
from hpcml.train.loop import train
from tests.train.jobs import hpcml, metrics, summary, write_job

MORE = ("train.precision=fp64", "model.dropout=0.1", "run.eval_every=2", "model.heads=4")


def go(folder: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    """Train with ranks that are threads; the folder of the results."""
    job = folder / "job.toml"
    if not job.exists():
        write_job(folder)
    config = configuration.load(job, [f"run.dir={folder / name}", *MORE, *overrides])
    assert set(run(train, config, ranks=ranks)) == {0}
    return folder / name


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("serial"), "serial")


def same(found: Path, expected: Path) -> None:
    """Losses, validation, weights and the number of parameters; all shapes are the serial ones."""
    for mine, theirs in zip(metrics(found), metrics(expected), strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            assert (key in mine) == (key in theirs)
            np.testing.assert_allclose(mine.get(key, 0), theirs.get(key, 0), rtol=1e-10)
    assert summary(found)["params"] == summary(expected)["params"]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert list(mine) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["mesh.tp=2"]),
        (4, ["mesh.tp=4", "tensor.sequence_parallel=true"]),
        (4, ["mesh.tp=2", "zero.stage=3", "tensor.partition_activations=yes"]),
        (2, ["mesh.tp=2", "tensor.split=naive"]),
        (3, ["mesh.cp=3", "zero.stage=1"]),
        (4, ["mesh.cp=2", "mesh.tp=2", "tensor.sequence_parallel=true", "zero.stage=2"]),
    ],
    ids=str,
)
def test_results_are_those_of_one_rank(
    serial: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    found = go(tmp_path, "parallel", *overrides, ranks=ranks)
    same(found, serial)
    record: dict[str, Any] = metrics(found)[0]
    axes = {name.partition("=")[0][5:] for name in overrides if name.startswith("mesh.")}
    assert axes <= {axis for joined in record["comm"] for axis in joined.split("*")}
    # The saved configuration is that of a run that can be made again.
    assert json.loads((found / "env.json").read_text())["mesh"]["tp"] in (1, 2, 4)


def test_the_same_bits_twice_and_on_more_data_parallel_ranks(tmp_path: Path) -> None:
    """Deterministic mode, at equal tensor- and context-parallel sizes."""
    options = ["run.deterministic=true", "mesh.tp=2", "train.microbatch=1",
               "tensor.sequence_parallel=true"]  # fmt: skip
    one = go(tmp_path, "one", *options, ranks=2)
    two = go(tmp_path, "two", *options, "zero.stage=2", ranks=4)
    assert summary(one)["param_hash"] == summary(two)["param_hash"]
    contexts = ["run.deterministic=true", "mesh.cp=2", "train.microbatch=1"]
    one = go(tmp_path, "one context", *contexts, ranks=2)
    two = go(tmp_path, "two contexts", *contexts, "zero.stage=3", ranks=4)
    assert summary(one)["param_hash"] == summary(two)["param_hash"]


def test_under_mpiexec_a_sample_is_shown_and_can_be_had_again(tmp_path: Path) -> None:
    """All ranks make it together, from parts of the model."""
    job = write_job(tmp_path)
    done = hpcml(
        "train", job, "mesh.tp=2", "tensor.sequence_parallel=true", "run.log_every=2",
        ranks=2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A sample:" in done.stdout and "tp(2)" in done.stdout
    again = hpcml("sample", tmp_path / "runs" / "job", "--prompt", "to be", "--tokens", "20")
    assert again.returncode == 0 and again.stdout.startswith("to be")


def test_heads_that_do_not_divide_are_one_line_on_every_rank(tmp_path: Path) -> None:
    done = hpcml("train", write_job(tmp_path), "mesh.tp=4", ranks=4, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("hpcml: error: ") and done.stderr.count("\n") == 1
    assert "heads=2" in done.stderr and "mesh.tp" in done.stderr
