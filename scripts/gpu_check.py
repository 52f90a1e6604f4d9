"""Runs the parts of the check of the GPU, each with a time limit, and writes what came of them.

Called by gpu_check.sh. Parts share the time: each may take its share of what is left, so that what
one does not need goes to those after it. All that parts print is in gpu.log, as it comes.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_rows import END, ROOT, end, marked, parsed, reason

HERE = Path(__file__).resolve().parent
_ALL = 585  # seconds of all parts and what comes before them
_GRACE = 3.0
"""Seconds for a part that is interrupted to say where it was."""


def _script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *arguments]


PREPARE = [_script("gpu_prepare", "cpu"), _script("gpu_prepare", "torch")]
COMPILE = [
    _script("gpu_prepare", dtype, depth)
    for depth in ("128", "64", "32") for dtype in ("float32", "float64", "bfloat16", "float16")
]  # fmt: skip
"""What takes long once, each a process since compilers use one core; started before the parts.

Compilers stand still during parts that are `timed`. What prepares must not: others wait
for its lock.
"""


class Part(NamedTuple):
    """A part of the check: what is run, its share of the time in seconds, and what it shows."""

    command: list[str]
    share: int
    shows: str
    timed: bool = False
    """Whether it takes the time of something, or has little time itself: nothing else shall run."""


PARTS = {
    "machine": Part(_script("gpu_machine"), 20, "what is installed, and the GPU as it was found",
                    True),
    "mpi": Part(_script("gpu_messages", "ways"), 70,
                "whether ranks start, and whether MPI takes memory of the GPU", True),
    "kernels": Part(_script("gpu_tests", "kernels", "images", "cudnn"), 40,
                    "every kernel but attention against its specification in float64, and cuDNN's "
                    "results, all types"),
    "gpt2": Part(_script("gpu_steps", "gpt2"), 90,
                 "a training step of GPT-2 124M, bf16, block 1024, beside PyTorch", True),
    "profile": Part(_script("gpu_profile"), 25,
                    "where the time of our step of GPT-2 124M goes, by operator", True),
    "attention": Part(_script("gpu_tests", "attention", "primitives"), 45,
                      "our attention against its specification in float64, and every primitive "
                      "beside the CPU, all types"),
    "ranks": Part(_script("gpu_tests", "training", "messages"), 40,
                  "training with dp, ZeRO 0-3, tp, pp, cp, spatial beside the CPU; collectives, "
                  "halos and adjoints, direct and staged; ranks are threads"),
    "resnet50": Part(_script("gpu_steps", "resnet50"), 60,
                     "a training step of ResNet-50, bf16, beside PyTorch", True),
    "doctor": Part(_script("gpu_doctor"), 60,
                   "hpcml doctor: this machine, its MPI, and the way of each operator"),
    "processes": Part(_script("gpu_processes"), 80,
                      "training with dp, ZeRO 1-3, tp, pp, cp, spatial by 2 and 4 processes, "
                      "direct and staged, and hpcml train, beside one rank"),
    "collectives": Part(_script("gpu_messages", "collectives"), 35,
                        "collectives between 2 and 4 processes, direct and staged: values of all "
                        "types, bandwidth", True),
    "ways": Part(_script("gpu_ways"), 20,
                 "attention and convolutions of GPT-2 and ResNet-50 by cuDNN and by our own "
                 "kernels: which was taken, how they differ, milliseconds of both", True),
}  # fmt: skip


def run(name: str, part: Part, log: Path, limit: float = math.inf) -> dict[str, Any]:
    """Run one part for at most `limit` seconds; what it found, and why it failed if it did.

    What it prints is added to `log`.
    """
    start, limit = time.monotonic(), max(limit, 1.0)
    environment, mark = marked(os.environ | {"HPCML_GPU": "1", END: str(start + limit)})
    with log.open("ab") as output:
        output.write(f"== {name}\n".encode())
        output.flush()
        begin = output.tell()
        job = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        code = job.wait(limit if math.isfinite(limit) else None)
        ended = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        ended = f"not done after {limit:.0f} s"
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(job.pid, signal.SIGINT)
            job.wait(_GRACE)
    finally:
        end(mark)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a GPU's memory takes time to free
            job.wait(_GRACE)
    with log.open("rb") as output:
        output.seek(begin)
        lines = output.read().decode(errors="replace").splitlines()
    result = {"shows": part.shows, **_told(lines), "seconds": round(time.monotonic() - start, 1)}
    printed = [line for line in lines if line.strip() and not parsed(line)][-60:]
    why = [f"{ended}: {reason(printed)}"] if ended else []
    result["failure"] = "; ".join(why + _faults(result))
    result["not shown"] = _gaps(result)
    result["ok"] = not result["failure"]
    if result["failure"]:
        result["output"] = printed
    print(f"{name}: {_outcome(result)} ({result['seconds']} s)", flush=True)
    return result


def _missing(part: Part) -> dict[str, Any]:
    """What is known of a part before it is run, and should it never be."""
    return {"shows": part.shows, **_told([]), "seconds": 0.0, "failure": "not reached",
            "not shown": "", "ok": False}  # fmt: skip


def _outcome(result: dict[str, Any]) -> str:
    """How a part ended, and what of it nobody has seen."""
    gaps = f"not shown: {result['not shown']}" if result["not shown"] else ""
    return "; ".join(filter(None, [result["failure"] or "ok", gaps]))


def _told(lines: list[str]) -> dict[str, Any]:
    """What the lines of JSON among these say (see gpu_rows)."""
    told: dict[str, Any] = {"found": {}, "asked": [], "rows": []}
    for line in lines:
        match parsed(line):
            case {"row": row}:
                told["rows"].append(row)
            case {"asked": asked}:
                told["asked"].append(asked)
            case found:
                told["found"] |= found
    return told


def _faults(told: dict[str, Any]) -> list[str]:
    """What is wrong with what a part told."""
    rows = told["rows"]
    bad = [row for row in rows if row.get("error") or row.get("agrees") is False]
    found = [f"{len(bad)} of {len(rows)} rows failed"] if bad else []
    found += [
        f"{asked['verdict']}: {asked['what']}: {asked['reached']}, asked {asked['at least']}"
        for asked in told["asked"] if asked["verdict"] != "held"
    ]  # fmt: skip
    return found if rows or told["found"] else [*found, "showed nothing"]


def _gaps(told: dict[str, Any]) -> str:
    """What was asked for and cannot be seen on this machine, and why: no failure, nor a success."""
    gaps = [row for row in told["rows"] if row.get("agrees") == "not shown"]
    named = {f"{next(iter(row.values()))} ({row.get('because', '')})" for row in gaps}
    return "; ".join(sorted(named))[:500]


def table(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    parts = report["parts"]
    machine = parts.get("machine", {}).get("found") or {}
    lines = [f"# GPU check of {report['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += _rows([
        {"part": name, "shows": part["shows"], "result": _outcome(part),
         "seconds": part["seconds"]} for name, part in parts.items()
    ])  # fmt: skip
    lines += _rows([{"part": name, **row} for name, part in parts.items() for row in part["asked"]])
    for name, part in parts.items():
        notes = part["found"] if name != "machine" else {}
        if part["rows"] or notes:
            lines += ["", f"## {name}"]
        lines += ["", *(f"- {about}: {value}" for about, value in notes.items())] if notes else []
        lines += _rows(part["rows"])
    return "\n".join(lines) + "\n"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as lines of Markdown, below an empty one."""
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(key, "")).replace("|", "/") for key in keys] for row in rows]
    return ["", *(f"| {' | '.join(line)} |" for line in [keys, ["---"] * len(keys), *cells])]


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    """Run the parts that were asked for, by default all; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--spent", type=int, default=0, help="seconds since it was called")
    asked = parser.parse_args()
    until = time.monotonic() + _ALL - asked.spent
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, _stop)  # what is under way ends with this
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    report["parts"] = {}
    asked.out.mkdir(parents=True, exist_ok=True)
    environment, mark = marked(os.environ)
    with (asked.out / "compile.log").open("wb") as said:
        how: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": said, "stderr": said}
        compilers = [subprocess.Popen(command, **how) for command in COMPILE]
        others = [subprocess.Popen(command, **how) for command in PREPARE]
    try:
        measure(asked.parts or list(PARTS), asked.out, report, until, compilers)
    finally:
        end(mark)
        for process in compilers + others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    print(table(report))
    parts = report["parts"]
    failed = [name for name, part in parts.items() if not part["ok"]]
    unseen = [name for name, part in parts.items() if part["not shown"]]
    if unseen:
        print("not all shown: " + ", ".join(unseen))
    print("failed: " + ", ".join(failed) if failed else "no part failed")
    return 1 if failed else 0


@contextlib.contextmanager
def still(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Let processes stand still: inside, the cores and the disk are another's."""
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def measure(
    names: list[str], out: Path, report: dict[str, Any], until: float,
    compilers: Sequence[subprocess.Popen[bytes]] = (),
) -> None:  # fmt: skip
    """Run the parts of these names and add what came of them to the report.

    `compilers` work beside parts that are not timed.
    """
    log = out / "gpu.log"
    log.write_bytes(b"")
    if "mpi" not in names and {"processes", "collectives"} & set(names):
        names = ["mpi", *names]  # they take the ways that it finds
    report["parts"] = {name: _missing(PARTS[name]) for name in names}
    write(report, out)
    for position, name in enumerate(names):
        weights = [PARTS[other].share for other in names[position:]]
        limit = (until - time.monotonic()) * weights[0] / sum(weights)
        with still(compilers if PARTS[name].timed else ()):
            report["parts"][name] = found = run(name, PARTS[name], log, limit)
        os.environ.update(found["found"].get("environment", {}))
        write(report, out)  # what is known is there even if this is stopped


def write(report: dict[str, Any], out: Path) -> None:
    """Write the report for programs and for people."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(table(report))


if __name__ == "__main__":
    sys.exit(main())
