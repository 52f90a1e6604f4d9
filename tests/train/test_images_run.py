"""Runs on images: what they record, and that evaluation is of the whole validation part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpcml.autograd import Tensor
from hpcml.cli import main
from hpcml.data.images import images
from hpcml.models import MeshNet, ResNet
from hpcml.nn.evaluation import accuracy, evaluating
from tests.data.pictures import write_pair
from tests.train.jobs import hpcml, metrics, summary

JOB = """
[run]
steps = 8
log_every = 0
eval_every = 4
[data]
kind = "images"
path = "{path}"
val_fraction = 0.3
shift = 1
[model]
kind = "{kind}"
{model}
[optim]
kind = "sgd"
lr = 0.1
[train]
global_batch = 8
microbatch = 4
"""
KINDS = {
    "resnet": "width = 4\nsmall_images = true",
    "meshnet": "widths = [4, 4]\nconvs = 1",
}


def write_job(folder: Path, kind: str) -> Path:
    """Images that are bright on the left or on the right, half of them or half of their pixels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(37, 1, 10, 9)).astype(np.float32)
    labels = np.arange(37) % 2
    images[labels == 0, :, :, :4] += 3
    images[labels == 1, :, :, 5:] += 3
    if kind == "meshnet":
        labels = (images[:, 0] > 1.5).astype(np.int64)
    path = write_pair(folder, images, labels)
    job = folder / "job.toml"
    job.write_text(JOB.format(path=path, kind=kind, model=KINDS[kind]))
    return job


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_records(tmp_path: Path, kind: str) -> None:
    job, folder = write_job(tmp_path, kind), tmp_path / "run"
    assert main(["train", str(job), f"run.dir={folder}"]) == 0
    records, result = metrics(folder), summary(folder)
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    assert [r["step"] for r in records if "val_accuracy" in r] == [3, 7]
    assert result["val_accuracy"] == records[-1]["val_accuracy"] > 0.5
    info = json.loads((folder / "data.json").read_text())["info"]
    assert info["num_classes"] == 2 and len(info["mean"]) == len(info["std"]) == 1
    # what was saved gives it again, running estimates included
    data = images(0, str(tmp_path / "images.npy"), val_fraction=0.3)
    if kind == "resnet":
        model = ResNet(1, 2, width=4, small_images=True)
    else:
        model = MeshNet(1, 2, (10, 9), (4, 4), 1)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    x, y = (np.stack(field) for field in zip(*(data.val[i] for i in range(11)), strict=True))
    with evaluating(model):
        found = accuracy(model(Tensor(x)), y)
    assert found == pytest.approx(result["val_accuracy"], abs=1e-12)


def test_ranks_make_no_difference(tmp_path: Path) -> None:
    """Nor does where a run begins again with what another has saved."""
    job = write_job(tmp_path, "resnet")
    assert main(["train", str(job), f"run.dir={tmp_path / 'one'}"]) == 0
    ended = hpcml("train", job, f"run.dir={tmp_path / 'two'}", "zero.stage=2", ranks=2)
    assert ended.returncode == 0, ended.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=2e-3)
    for name in ("val_loss", "val_accuracy"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=2e-3)
    mine, other = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    for name, array in mine.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-2, atol=2e-3, err_msg=name)
    assert mine["bn1.num_batches_tracked"] == 8
    again = ["run.steps=1", "optim.lr=1e-30", f"model.init_from={tmp_path}/one/model.safetensors"]
    assert main(["train", str(job), f"run.dir={tmp_path / 'again'}", *again]) == 0
    saved = load_file(tmp_path / "again" / "model.safetensors")
    np.testing.assert_array_equal(saved["fc.weight"], mine["fc.weight"])
    assert saved["bn1.num_batches_tracked"] == 9


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        ("meshnet", "model.widths=[4,4,4,4,4,4]", ["image of 10 x 9", "model.widths"]),
        ("resnet", "data.labels=none.npy", ["none.npy", "No such file"]),
        ("resnet", "model.depth=20", ["depth=20", "18, 34, 50"]),
        ("resnet", "data.num_classes=1", ['label 1 in "', "labels.npy"]),
        ("resnet", "mesh.tp=2", ["tp(2)"]),
    ],
)
def test_one_line_for_what_cannot_be(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, change: str, parts: list[str]
) -> None:
    job = write_job(tmp_path, kind)
    assert main(["train", str(job), f"run.dir={tmp_path / 'run'}", change]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "run").exists()
