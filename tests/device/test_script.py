"""scripts/gpu_check.sh without a GPU, and the parts that it runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.device import standin

SCRIPTS = Path(__file__).parents[2] / "scripts"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    script = str(SCRIPTS / "gpu_check.sh")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr


def test_a_part_that_fails_or_hangs_is_told_and_stops_no_other() -> None:
    check = loaded("gpu_check")
    programs = {
        "good": "print('{\"rows\": [{\"a\": 1}]}')", "bad": "print('why'); raise SystemExit(3)",
        "long": "import time; print('{\"rows\": []}\\nso far', flush=True); time.sleep(600)",
    }  # fmt: skip
    report: dict[str, Any] = {"date": "today", "parts": {}}
    for name, program in programs.items():
        limit = 1 if name == "long" else 60
        part = check.Part([sys.executable, "-c", program], limit, "something")
        report["parts"][name] = check.run(name, part)
    parts = report["parts"]
    assert parts["good"]["ok"] and parts["good"]["found"] == {"rows": [{"a": 1}]}
    assert parts["bad"]["failure"] == "exit code 3" and parts["bad"]["last_line"] == "why"
    assert parts["long"]["failure"] == "not done after 1 s"
    assert parts["long"]["found"] == {"rows": []} and parts["long"]["last_line"] == "so far"
    page = check.table(json.loads(json.dumps(report)))
    assert "| bad | something | exit code 3: why |" in page and "## good" in page


def test_limits_of_all_parts_leave_ten_minutes() -> None:
    assert sum(part.limit for part in loaded("gpu_check").PARTS.values()) < 600


def test_the_report_goes_through_a_pipe_and_nothing_outlives_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Copying it to /dev/stdout did not; children with a session of their own stayed on the GPU."""
    check = loaded("gpu_check")
    child = "import time; open('pid', 'w').write(str(__import__('os').getpid())); time.sleep(600)"
    program = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], "
        f"start_new_session=True, cwd={str(tmp_path)!r}); time.sleep(600)"
    )
    part = check.Part([sys.executable, "-c", program], 60, "nothing")
    monkeypatch.setattr(check, "PARTS", {"long": part})
    monkeypatch.setattr(check, "_ALL", 8)  # seconds are left for all parts
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--spent", "4"])
    assert check.main() == 1
    printed = capfd.readouterr().out
    assert "not done after 3 s" in printed and printed.endswith("failed: long\n")
    process = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(100):  # it may be there until somebody has looked at how it ended
        if not process.exists() or process.read_text().rsplit(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a child of the part is still there")


def test_our_step_of_gpt2_is_measured(standing_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, tiny; PyTorch has no GPU here, and that is a row of its own."""
    parts = loaded("gpu_parts")
    monkeypatch.setattr(parts, "STEPS", 1)
    monkeypatch.setattr(parts, "WARM", 1)
    monkeypatch.setattr(parts, "machine", lambda: {"gpu": "an H200 of the tests"})
    found = parts.gpt2(1, 4, 11, 1, 1, 8)
    assert found["ok"] and found["rows"][0]["contender"] == "hpcml"
    assert found["rows"][0]["ours is faster by"] == 1
    assert [row["contender"] for row in found["rows"][1:]] == ["PyTorch eager", "torch.compile"]


def test_both_ways_of_an_operator_are_compared(
    standing_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = loaded("gpu_ways")
    monkeypatch.setattr(ways, "STEPS", 1)
    monkeypatch.setattr(ways, "ATTENTION", (1, 1, 64, 16))
    monkeypatch.setattr(ways, "LAYERS", ((2, 5, 3, 8, 3, 2),))
    monkeypatch.setenv("HPCML_CUDNN", "auto")  # to be put back
    with standin.with_cudnn():
        assert ways.main() == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["type"] for row in rows] == ["bf16"] * 5 + ["fp32"] * 3
    assert all(row["way"].startswith("cuDNN") for row in rows)
    assert any(row["difference"] > 0 for row in rows)
