"""How runs end: signals during validation, full disks, runs that started from another's weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpcml.cli
from hpcml.cli import main
from hpcml.comm.guard import StopFlag
from hpcml.errors import UserError
from hpcml.train.run_dir import JsonLines
from tests.comm.jobs import child_environment
from tests.train.jobs import metrics, summary, write_job


def test_a_signal_cuts_validation_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be obeyed only when the whole validation part was through."""
    asked = []

    def agreed(self: StopFlag, axis: object, late: int) -> bool:
        asked.append(axis)
        return len(asked) == 3  # the third batch of the first validation

    monkeypatch.setattr(StopFlag, "agreed", agreed)
    folder = tmp_path / "r"
    job = str(write_job(tmp_path))
    assert main(["train", job, f"run.dir={folder}", "run.eval_every=1"]) == 130
    (record,) = metrics(folder)
    assert "val_loss" not in record and len(asked) == 3
    result = summary(folder)
    assert result["exit"] == "interrupted" and result["val_loss"] is None


def test_an_interrupt_outside_the_loop_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(hpcml.cli, "_command", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "hpcml: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line() -> None:
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(UserError, match=r"/dev/full.*No space left"):
        lines.write({"step": 0})
    lines.close()


def test_a_reader_who_leaves_ends_any_command_quietly(tmp_path: Path) -> None:
    """`hpcml sample RUN_DIR | head` used to end in a traceback."""
    folder = tmp_path / "r"
    assert main(["train", str(write_job(tmp_path)), f"run.dir={folder}"]) == 0
    command = (
        f"{sys.executable} -m hpcml sample {folder} --tokens 2000 | true; echo ${{PIPESTATUS[0]}}"
    )
    environment = child_environment(PYTHONUNBUFFERED="")  # what is printed is written at the end
    done = subprocess.run(
        ["bash", "-c", command], env=environment, text=True, capture_output=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_fine_tuned_run_is_sampled_without_what_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, base, tuned = str(write_job(tmp_path)), tmp_path / "base", tmp_path / "tuned"
    assert main(["train", job, f"run.dir={base}"]) == 0
    start = f"model.init_from={base / 'model.safetensors'}"
    assert main(["train", job, f"run.dir={tuned}", start]) == 0
    shutil.rmtree(base)
    assert main(["sample", str(tuned), "--prompt", "to be", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("to be")
