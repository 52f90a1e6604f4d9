"""The end of a run: all ranks gather its weights together, or the first is alone and says so."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpcml import memory
from hpcml.comm.guard import StopFlag
from hpcml.comm.threads import run
from hpcml.errors import MemoryLimitError, NonFiniteError, UserError
from hpcml.parallel import Step
from hpcml.train import config as configuration
from hpcml.train import usage
from hpcml.train.config import Config
from hpcml.train.loop import train
from tests.train.jobs import summary, write_job


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.load(write_job(tmp_path), [f"run.dir={tmp_path / 'r'}", "run.log_every=1"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "r"


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranks that gathered the parameters, and how many; each is broadcast, so that all must come.

    Where a rank is missing, the others time out.
    """
    found = []
    gathered = Step.gathered

    def together(self: Step) -> Iterator[tuple[str, Any]]:
        count = 0
        for name, values in gathered(self):
            yield name, self.mesh.world.broadcast(values)
            count += 1
        found.append((self.mesh.rank, count))

    monkeypatch.setattr(Step, "gathered", together)
    return found


def parameters(folder: Path) -> int:
    return len(load_file(folder / "model.safetensors"))


def test_all_ranks_gather_what_the_first_writes(
    config: Config, folder: Path, walks: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, config, ranks=3, timeout=60) == [0, 0, 0]
    count = parameters(folder)
    assert sorted(walks) == [(rank, count) for rank in range(3)]
    assert summary(folder)["param_hash"] is not None
    said = capsys.readouterr().out
    assert said.count("where did all the memory go") == said.count("A sample:") == 1
    rows = {line[:20].strip(): line.split() for line in said.splitlines()}
    assert all(abs(float(rows[name][4])) < 2 for name in ("params", "grads", "optim"))
    assert "zero.stage=0, 3 rank(s)" in said


def test_a_signal_that_all_have_heard_of_leaves_weights(
    config: Config, folder: Path, walks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopFlag, "agreed", lambda self, axis, late: True)
    assert run(train, config, ranks=2, timeout=60) == [130, 130]
    count = parameters(folder)
    assert sorted(walks) == [(0, count), (1, count)]
    result = summary(folder)
    assert result["exit"] == "interrupted" and result["steps"] == 1 and result["param_hash"]


def failing(monkeypatch: pytest.MonkeyPatch, error: Callable[[Step], BaseException]) -> None:
    def step(self: Step, batch: Any) -> float:
        raise error(self)

    monkeypatch.setattr(Step, "__call__", step)


def test_a_loss_that_is_no_number_leaves_a_hash_and_no_weights(
    config: Config, folder: Path, walks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda step: NonFiniteError("nan"))
    with pytest.raises(NonFiniteError):
        run(train, config, ranks=2, timeout=60)
    assert [rank for rank, _ in sorted(walks)] == [0, 1]
    assert summary(folder)["exit"] == "non-finite" and summary(folder)["param_hash"]
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("interrupt", [True, False])
def test_the_first_rank_alone_does_not_gather_what_lies_in_parts(
    config: Config, folder: Path, walks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
    interrupt: bool,
) -> None:  # fmt: skip
    """Others do not come after a failure or a second interrupt: it would wait for them."""

    def error(step: Step) -> BaseException:
        sharding = replace(step.groups.sharding, stage=3)
        step.groups = replace(step.groups, sharding=sharding)
        return KeyboardInterrupt() if interrupt else RuntimeError("one rank only")

    failing(monkeypatch, error)
    with pytest.raises(KeyboardInterrupt if interrupt else RuntimeError):
        run(train, config, ranks=2, timeout=60)
    assert walks == []
    result = summary(folder)
    assert result["param_hash"] is None and result["params"] > 0
    assert result["exit"] == ("interrupted" if interrupt else "failed")
    assert not (folder / "model.safetensors").exists()


def test_all_ranks_refuse_where_the_first_cannot_write(
    config: Config, folder: Path, walks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not go on to the sample and wait there for the first."""
    path = folder / "model.tmp"
    monkeypatch.setattr(StopFlag, "agreed", lambda self, axis, late: path.mkdir(exist_ok=True))
    errors = []

    def refused() -> None:
        with pytest.raises(UserError) as caught:
            train(config)
        errors.append(str(caught.value))

    run(refused, ranks=2, timeout=60)
    assert errors[0] == errors[1] and "model.safetensors" in errors[0] and "\n" not in errors[0]
    assert not (folder / "summary.json").exists()


def test_a_run_beyond_its_limit_ends_with_the_table_and_a_summary(
    config: Config, folder: Path
) -> None:
    """The states fit and the activations do not; the thread has no limit afterwards."""
    gc.collect()
    limit = memory.account().total + 16 * 26_336 + 100_000
    with pytest.raises(MemoryLimitError) as caught:
        train(replace(config, device=replace(config.device, memory_limit=limit)))
    error = caught.value
    assert error.category == "activations" and error.live["optim"] >= 8 * 26_336
    line, header, *_ = str(error).splitlines()
    assert f"limit of {limit:,}" in line and header.startswith("where did all the memory go")
    assert summary(folder)["exit"] == "failed"
    assert memory.account().limit == 0


def test_peaks_are_those_of_the_run(config: Config, folder: Path) -> None:
    passing = memory.empty((1 << 30,), np.uint8, "activations")
    del passing
    assert train(config) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["memory"]["activations_peak"]["max"] < 1 << 30
    assert set(lines[0]["memory"]) == set(usage.own_memory())
