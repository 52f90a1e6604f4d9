"""Runs the parts of the check of the GPU, each with a time limit, and writes what came of them.

Called by gpu_check.sh; the parts that measure are in gpu_parts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--maxfail=40", "-p", "no:cacheprovider",
          "--no-header", "--tb=line", "-rf"]  # fmt: skip
_ALL = 595  # seconds of all parts and what comes before them
_MARK = "HPCML_GPU_PART"
KERNELS = ("kernels", "attention", "images", "cudnn", "primitives")
MEASURED = [sys.executable, str(HERE / "gpu_parts.py")]


class Part(NamedTuple):
    """A part of the check: what is run, for how many seconds at most, and what it shows."""

    command: list[str]
    limit: int
    shows: str


PARTS = {
    "machine": Part([*MEASURED, "machine"], 20, "what is installed"),
    "kernels": Part([*PYTEST, *(f"tests/device/test_{name}.py" for name in KERNELS)], 105,
                    "every kernel against its specification in float64 and every primitive "
                    "beside the CPU, all types"),
    "ranks": Part([*PYTEST, "tests/device/test_training.py", "tests/device/test_messages.py"], 90,
                  "training with dp, ZeRO 0-3, tp, pp, cp beside the CPU; collectives, halos and "
                  "adjoints, direct and staged; ranks are threads"),
    "processes": Part([*MEASURED, "processes"], 85,
                      "hpcml train under mpiexec with 2 and 4 ranks on the GPU beside one"),
    "ways": Part([sys.executable, str(HERE / "gpu_ways.py")], 45,
                 "attention and convolutions of GPT-2 and ResNet-50 by cuDNN and by our own "
                 "kernels: which was taken, how they differ, milliseconds of both"),
    "collectives": Part([sys.executable, str(HERE / "gpu_messages.py")], 85,
                        "collectives between 2 and 4 processes, direct and staged: values of all "
                        "types, bandwidth"),
    "gpt2": Part([*MEASURED, "gpt2"], 105,
                 "a training step of GPT-2 124M, bf16, block 1024, beside PyTorch"),
    "resnet50": Part([*MEASURED, "resnet50"], 60, "a training step of ResNet-50 beside PyTorch"),
}  # fmt: skip


def run(name: str, part: Part, left: float = math.inf) -> dict[str, Any]:
    """Run one part, in the seconds that are left; what it found, or why it failed."""
    start, limit = time.monotonic(), max(int(min(part.limit, left)), 1)
    mark = f"{os.getpid()}.{name}"
    job = subprocess.Popen(
        part.command, cwd=HERE.parent, env=os.environ | {"HPCML_GPU": "1", _MARK: mark}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = job.communicate(timeout=limit)
        failure = "" if job.returncode == 0 else f"exit code {job.returncode}"
    except subprocess.TimeoutExpired:
        _end(mark)
        output, _ = job.communicate()
        failure = f"not done after {limit} s"
    lines = [line for line in output.splitlines() if line.strip()]
    found = None
    for line in [line for line in lines if line.startswith("{")]:
        with contextlib.suppress(ValueError):  # the last one counts; a part may be ended before
            found = json.loads(line)
            lines.remove(line)
    last = lines[-1] if lines else ""
    result = {"ok": not failure, "shows": part.shows, "found": found, "last_line": last[:200],
              "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
    if failure:
        result |= {"failure": failure, "output": lines[-60:]}
    print(f"{name}: {failure or 'ok'} ({result['seconds']} s) {last[:120]}", flush=True)
    return result


def _end(mark: str) -> None:
    """End a part and all it has started, which may have sessions of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended, or be another user's
            if f"{_MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def table(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    machine = report["parts"].get("machine", {}).get("found") or {}
    lines = [f"# GPU check of {report['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| part | shows | result | seconds |", "|---|---|---|---|"]
    for name, part in report["parts"].items():
        result = part.get("failure", "ok") + (f": {part['last_line']}" if part["last_line"] else "")
        lines.append(f"| {name} | {part['shows']} | {result} | {part['seconds']} |")
    for name, part in report["parts"].items():
        rows = (part["found"] or {}).get("rows", [])
        if rows:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {name}", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += [f"| {' | '.join(str(row.get(key, '')) for key in keys)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the parts that were asked for, by default all; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--spent", type=int, default=0, help="seconds since it was called")
    asked = parser.parse_args()
    end = time.monotonic() + _ALL - asked.spent
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    report["parts"] = {}
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.parts or PARTS:
        report["parts"][name] = run(name, PARTS[name], end - time.monotonic())
        # Written after each part: what is known is there even if this is stopped.
        (asked.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (asked.out / "gpu.md").write_text(table(report))
    print(table(report))
    failed = [name for name, part in report["parts"].items() if not part["ok"]]
    print("failed: " + ", ".join(failed) if failed else "all parts passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
