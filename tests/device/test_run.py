"""`hpcml train` with device.kind = "cuda": a whole run on the stand-in, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpcml import backend
from hpcml.cli import main
from hpcml.errors import UserError
from tests.device import standin
from tests.train.jobs import metrics, write_job


def test_a_run_leaves_what_one_on_the_cpu_does(standing_in: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, steps=2)
    folders = {}
    for kind in ("cpu", "cuda"):
        folders[kind] = tmp_path / kind
        command = ["train", str(job), f"run.dir={folders[kind]}", f"device.kind={kind}",
                   "data.sequence_length=6", "model.width=8", "model.layers=1", "run.eval_every=2",
                   "run.eval_batches=1", "train.precision=fp64"]  # fmt: skip
        assert main(command) == 0
    assert standin.used == [0]
    records = [metrics(folder) for folder in folders.values()]
    for on_cpu, on_device in zip(*records, strict=True):
        assert on_device["loss"] == pytest.approx(on_cpu["loss"], rel=1e-9)
    assert records[1][-1]["val_loss"] == pytest.approx(records[0][-1]["val_loss"], rel=1e-9)
    for name in ("params", "grads", "optim"):
        assert records[1][0]["memory"][name]["max"] >= records[0][0]["memory"][name]["max"] * 0.9
    weights = [load_file(folder / "model.safetensors") for folder in folders.values()]
    for name, values in weights[0].items():
        np.testing.assert_allclose(weights[1][name], values, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("failure", ["none", "no driver"])
def test_without_a_gpu_cuda_is_an_error_with_a_remedy(failure: str, standing_in: Any) -> None:
    def count() -> int:
        if failure == "no driver":
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return 0

    standing_in.cuda.runtime.getDeviceCount = count
    with pytest.raises(UserError, match=r'device\.kind="cuda" finds no GPU.*device\.kind="cpu"'):
        backend.use_device("cuda", 0)


def test_ranks_of_a_node_take_its_gpus_in_turn(standing_in: Any) -> None:
    standing_in.cuda.runtime.getDeviceCount = lambda: 2
    assert [backend.use_device("cuda", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert backend.use_device("cpu", 3) == "cpu"
