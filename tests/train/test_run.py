"""What a run leaves behind, and that it does not depend on ranks or microbatches."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpcml.cli import main
from hpcml.train import config as configuration
from tests.train.jobs import hpcml, metrics, summary, write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), steps=20)


@pytest.fixture(scope="module")
def serial(job: Path) -> Path:
    folder = job.parent / "serial"
    assert main(["train", str(job), f"run.dir={folder}", "run.eval_every=10"]) == 0
    return folder


def test_files_of_a_run(serial: Path) -> None:
    names = {path.name for path in serial.iterdir()}
    assert names == {"config.toml", "data.json", "env.json", "metrics.jsonl", "model.safetensors",
                     "ranks", "summary.json"}  # fmt: skip
    assert [path.name for path in (serial / "ranks").iterdir()] == ["rank-00000.jsonl"]
    environment = json.loads((serial / "env.json").read_text())
    assert environment["ranks"][0]["rank"] == 0
    assert environment["packages"]["numpy"] == np.__version__


def test_records_of_the_metrics(serial: Path) -> None:
    records = metrics(serial)
    assert [record["step"] for record in records] == list(range(20))
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["lr"] == 1e-2
        assert record["samples_per_second"] == pytest.approx(6 / record["seconds"])
        assert record["tokens_per_second"] == pytest.approx(96 / record["seconds"])
    assert [r["step"] for r in records if "val_loss" in r] == [9, 19]
    assert records[-1]["loss"] < records[0]["loss"]


def test_memory_counts_every_byte_of_the_states(serial: Path) -> None:
    memory = metrics(serial)[0]["memory"]
    count = summary(serial)["params"]
    for name, copies in (("params", 1), ("grads", 1), ("optim", 2)):
        entry = memory[name]
        assert entry["min"] == entry["mean"] == entry["max"] and entry["max_rank"] == 0
        assert 4 * count * copies <= entry["max"] < 1.05 * 4 * count * copies  # alignment
    assert memory["activations_peak"]["max"] > 0


def test_summary_and_fingerprint(serial: Path) -> None:
    result, records = summary(serial), metrics(serial)
    assert result["exit"] == "completed" and result["steps"] == 20
    assert result["final_loss"] == records[-1]["loss"]
    assert result["val_loss"] == records[-1]["val_loss"]
    state = load_file(serial / "model.safetensors")
    assert sum(array.size for array in state.values()) == result["params"]
    model_order = ["transformer.wte.weight", "transformer.wpe.weight"]
    rest = [f"transformer.h.{i}.{part}" for i in range(2) for part in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
        "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias")]  # fmt: skip
    digest = hashlib.sha256()
    for name in [*model_order, *rest, "transformer.ln_f.weight", "transformer.ln_f.bias"]:
        digest.update(state[name].tobytes())
    assert result["param_hash"] == digest.hexdigest()


def test_the_resolved_configuration_runs_again_to_the_bit(serial: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", str(serial / "config.toml"), f"run.dir={again}"]) == 0
    assert summary(again)["param_hash"] == summary(serial)["param_hash"]
    written = configuration.load(again / "config.toml")
    assert written.model.options["width"] == 32


@pytest.mark.parametrize("options", [["train.microbatch=1"], ["train.microbatch=4"]])
def test_losses_do_not_depend_on_the_microbatch(
    serial: Path, job: Path, tmp_path: Path, options: list[str]
) -> None:
    assert main(["train", str(job), f"run.dir={tmp_path / 'r'}", *options]) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "r")]
    assert losses == pytest.approx([r["loss"] for r in metrics(serial)], rel=1e-5)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 3)])
def test_losses_do_not_depend_on_the_ranks(
    serial: Path, job: Path, tmp_path: Path, ranks: int, microbatches: int
) -> None:
    folder = tmp_path / "r"
    done = hpcml("train", job, f"run.dir={folder}", "run.eval_every=10", ranks=ranks)
    assert (done.returncode, done.stderr) == (0, "")
    ours, theirs = metrics(folder), metrics(serial)
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-5)
    traffic = ours[0]["comm"]["dp"]["all_reduce"]
    flat = ours[0]["memory"]["grads"]["max"]
    assert traffic["calls"] == 2  # the gradients, the losses
    assert traffic["bytes"] == flat + 8 * microbatches
    assert len(list((folder / "ranks").iterdir())) == ranks


def test_double_precision_and_initial_weights(serial: Path, job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    start = f"model.init_from={serial / 'model.safetensors'}"
    code = main(["train", str(job), f"run.dir={folder}", start, "run.steps=2"])
    assert code == 0
    assert metrics(folder)[0]["loss"] < metrics(serial)[0]["loss"] / 1.5
    double = tmp_path / "double"
    assert main(["train", str(job), f"run.dir={double}", "train.precision=fp64"]) == 0
    losses = [record["loss"] for record in metrics(double)]
    assert losses == pytest.approx([r["loss"] for r in metrics(serial)], rel=1e-3)
    assert load_file(double / "model.safetensors")["transformer.wte.weight"].dtype == np.float64


def test_sample_goes_on_from_a_prompt(serial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*options: str) -> str:
        assert main(["sample", str(serial), "--tokens", "20", *options]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    first = sample("--prompt", "to be")
    assert first.startswith("to be") and len(first) == 25
    assert sample("--prompt", "to be") == first
    assert sample("--prompt", "to be", "--seed", "1") != first


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--prompt", "Ω"], "Ω"),
        (["--prompt", ""], "--prompt"),
    ],
)
def test_sample_refuses_in_one_line(
    serial: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert main(["sample", str(serial), *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said


def test_sample_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path)]) == 2
    assert "no folder of a run" in capsys.readouterr().err
