"""The memory of a step is measured from outside, in processes of their own."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest

from hpcml.bench import step, step_memory
from hpcml.cli import main

MIB = 1 << 20
# What one step holds at once is known: a few MiB would drown in what pages the libraries touch.
WIDE = step.Size(2, 4, 256, 32, 8)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.SIZES, "small", WIDE)
    monkeypatch.setattr(step_memory, "_CLEAR", step_memory._CLEAR)


def states() -> int:
    """Bytes of parameters, gradients and the two moments of AdamW."""
    model = step.our_step(WIDE).model
    return 16 * sum(parameter.numel() for parameter in model.parameters())


def test_the_peak_holds_at_least_the_states(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--part", "memory", "--sizes", "small", "--rounds", "1"]) == 0
    _, _, heads, row = capsys.readouterr().out.splitlines()
    assert heads.split()[-2:] == ["hpcml", "MiB"]
    assert states() < float(row.split()[-1]) * MIB < states() + 100 * MIB


def test_the_peers_peak_is_measured_alike(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    arguments = ["--part", "memory", "--sizes", "small", "--rounds", "1", "--peer", "torch"]
    assert main(["bench", "step", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["part"], report["steps"]) == (3, "memory", 5)
    (row,) = report["rows"]
    assert row["ratio"] == row["peer"] / row["ours"]
    assert all(states() < row[who] < states() + 100 * MIB for who in ("ours", "peer"))


def test_a_status_is_read_in_bytes() -> None:
    before, size = step_memory._status("VmRSS"), 64 * MIB
    with mmap.mmap(-1, size) as held:  # new memory: malloc would give what was freed before
        held.write(b"x" * size)
        assert step_memory._status("VmRSS") - before > size // 2


def test_a_system_that_does_not_tell_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_memory, "_CLEAR", tmp_path / "none")
    assert main(["bench", "step", "--part", "memory"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none is missing: run this part on Linux" in line
