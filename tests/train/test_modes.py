"""Runs whose ranks are apart between steps: they learn as much, and end together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcml.comm.guard import StopFlag
from hpcml.comm.threads import run
from hpcml.train import config as configuration
from hpcml.train.loop import INTERRUPTED, train
from tests.train.jobs import hpcml, metrics, summary, write_job

STEPS = 400
MODES = {
    "sync": (),
    "local": ("mode=local", "period=4"),
    "async": ("mode=async", "staleness=3"),
    "elastic": ("mode=async", "elastic=0.15", "period=2", "staleness=1"),
}
# The centre moves by N / (N + 1) of what the ranks would by themselves.
RATES = {"elastic": 1.5e-2}
REGRESSION = """
[run]
log_every = 0
[data]
kind = "regression"
samples = 3000
in_features = 8
out_features = 1
noise = 0.3
[model]
kind = "mlp"
hidden = [16]
[optim]
kind = "adam"
schedule = "cosine"
warmup = 10
[train]
global_batch = 32
"""


def go(folder: Path, mode: str, *more: str, ranks: int = 2) -> tuple[int, Path]:
    """Train with ranks that are threads; the exit code and the folder of results."""
    (folder / "job.toml").write_text(REGRESSION)
    place = folder / f"{mode}-{ranks}"
    options = [f"data_parallel.{option}" for option in MODES[mode]]
    rate = f"optim.lr={RATES.get(mode, 1e-2)}"
    overrides = [f"run.dir={place}", f"run.steps={STEPS}", rate, *options, *more]
    config = configuration.load(folder / "job.toml", overrides)
    return run(train, config, ranks=ranks)[0], place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each mode."""
    folder = tmp_path_factory.mktemp("modes")
    found = {mode: go(folder, mode) for mode in MODES}
    assert {code for code, _ in found.values()} == {0}
    return {mode: place for mode, (_, place) in found.items()}


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_mode_reaches_the_synchronous_loss(finished: dict[str, Path], mode: str) -> None:
    expected, found = summary(finished["sync"]), summary(finished[mode])
    first = metrics(finished["sync"])[0]["loss"]
    assert expected["val_loss"] < 0.2 * first  # something was learned
    assert found["val_loss"] < 1.03 * expected["val_loss"]
    assert found["steps"] == expected["steps"] == STEPS


@pytest.mark.parametrize("mode", ["async", "elastic"])
def test_records_say_how_late_gradients_were(finished: dict[str, Path], mode: str) -> None:
    bound = int(MODES[mode][-1][-1])
    for record in metrics(finished[mode]):
        found = record["staleness"]
        assert 0 <= found["last"] <= found["max"] <= bound
        assert 0 <= found["mean"] <= found["max"]
    assert all("staleness" not in record for record in metrics(finished["sync"]))


@pytest.mark.parametrize("mode", ["async", "elastic"])
def test_the_summary_says_how_late_they_were_on_all_ranks(
    finished: dict[str, Path], mode: str
) -> None:
    files = sorted((finished[mode] / "ranks").glob("rank-*.jsonl"))
    every = [json.loads(path.read_text().splitlines()[-1])["staleness"] for path in files]
    found = summary(finished[mode])["staleness"]
    assert found["max"] == max(one["max"] for one in every)
    assert found["mean"] == pytest.approx(sum(one["mean"] for one in every) / len(every))
    assert len(every) > 1 and "staleness" not in summary(finished["sync"])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_what_was_validated(finished: dict[str, Path], mode: str) -> None:
    weights = finished[mode] / "model.safetensors"
    more = (f"model.init_from={weights}", "run.steps=1", "optim.lr=0.0")
    again, before = summary(go(finished[mode], "sync", *more, ranks=1)[1]), summary(finished[mode])
    assert again["param_hash"] == before["param_hash"]
    assert again["val_loss"] == pytest.approx(before["val_loss"], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {0: 0, 1: 0}
    agreed = StopFlag.agreed

    def hear(self: StopFlag, axis: Any, late: int) -> bool:
        asked[axis.rank] += 1
        if axis.rank == 1 and asked[1] == 3:
            self.signal = 2
        return agreed(self, axis, late)

    monkeypatch.setattr(StopFlag, "agreed", hear)
    code, place = go(tmp_path, mode)
    late = {"async": 3, "elastic": 1}.get(mode, 0)
    assert code == INTERRUPTED and summary(place)["exit"] == "interrupted"
    assert summary(place)["steps"] == len(metrics(place)) == asked[0] == asked[1] == 3 + late
    assert (place / "model.safetensors").exists()


def test_under_mpiexec(tmp_path: Path) -> None:
    """With checks of the copies and validations, in the middle of a period too."""
    job = write_job(tmp_path, 10)
    for mode in ("local", "async"):
        place = tmp_path / mode
        options = [f"data_parallel.{option}" for option in MODES[mode]]
        more = ["run.eval_every=3", "run.check_replicas=5", f"run.dir={place}"]
        done = hpcml("train", job, *more, *options, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert summary(place)["steps"] == 10
        assert [r["step"] for r in metrics(place) if "val_loss" in r] == [2, 5, 8, 9]
