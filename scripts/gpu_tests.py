"""A part of the check of the GPU: files of `tests/device`, each by some processes, all at once.

`python scripts/gpu_tests.py kernels attention ...`. A process has the tests of one type of
elements, so that none compiles what another does, and its part of those that name none. A test that
ends its process, or after which the GPU's context is lost, fails alone: another process goes on
with the tests after it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_plugin import PROCESSES, PROGRESS, SHARE
from gpu_rows import ROOT, Row, follow, left, tell

PYTEST = (
    sys.executable, "-m", "pytest", "-q", "-p", "gpu_plugin", "-p", "no:cacheprovider",
    "--no-header", "--tb=short", "--no-summary", "-m", "not mpi", "-o", "test_limit=75",
    "-W", "default",
)  # fmt: skip
"""What other libraries warn of is no failure here, as it is in the tests of every change."""
OWN = ("kernels", "attention", "images", "primitives")
"""What is about our own kernels, where cuDNN would take their place."""
OPTIONAL = ("cudnn",)
"""What needs a library that a machine may lack: if all is skipped, the row says so."""
MOST = 6
"""Processes one after the other for a share of a file: each loses a test."""


def main(names: list[str]) -> int:
    """Run the files of these names; failures are told by their rows."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: tell(row(name, Path(folder))), names))
    return 0


def row(name: str, folder: Path) -> Row:
    """Run one file; how many tests passed, and what else is to be known."""
    start = time.monotonic()
    places = [folder / f"{name}.{share}" for share in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        failures = list(pool.map(run, [name] * PROCESSES, range(PROCESSES), places))
    told = joined([outcomes(place) for place in places])
    made = summary(name, told, next(filter(None, failures), ""))
    return made | {"seconds": round(time.monotonic() - start, 1)}


def run(name: str, share: int, progress: Path) -> str:
    """Try all tests of a share of a file; why they were not, or an empty string."""
    progress.touch()
    failure = ""
    for _ in range(MOST):
        before = progress.stat().st_size
        environ = os.environ | {
            PROGRESS: str(progress),
            SHARE: str(share),
            "PYTHONPATH": f"{ROOT / 'scripts'}:{os.environ.get('PYTHONPATH', '')}",
        }
        environ.setdefault("OMP_NUM_THREADS", "1")  # others run beside it
        if name in OWN:
            environ["HPCML_CUDNN"] = "never"
        failure = follow([*PYTEST, f"tests/device/test_{name}.py"], left(), environ)
        if "ended" in outcomes(progress):
            return ""
        if progress.stat().st_size == before or left() < 1:
            break
    return failure or "not all tests were tried"


def joined(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """What all shares of a file have told; it was tried to the end if each of them was."""
    tests = {test: how for told in shares for test, how in told["tests"].items()}
    count = max(told.get("count", 0) for told in shares)  # each counts all tests of the file
    ended = {"ended": True} if all("ended" in told for told in shares) else {}
    return {"tests": tests, "count": count, **ended}


def outcomes(progress: Path) -> dict[str, Any]:
    """What the plugin wrote: by test its outcome and why, how many there are, if all were tried."""
    told: dict[str, Any] = {"tests": {}}
    for line in progress.read_text().splitlines():
        match json.loads(line):
            case [test, outcome, why]:
                told["tests"][test] = (outcome, why)
            case other:
                told |= other
    return told


def summary(name: str, told: dict[str, Any], failure: str) -> Row:
    """A row of the table for what was told of a file's tests."""
    tests = told["tests"]
    counts = Counter(outcome for outcome, _ in tests.values())
    bad = {test: why for test, (outcome, why) in tests.items() if outcome in ("failed", "died")}
    skipped = {why for outcome, why in tests.values() if outcome == "skipped"}
    unknown = told.get("count", 0) - len(tests)
    made: Row = {"tests": name, "passed": counts["passed"], "failed": len(bad),
                 "skipped": counts["skipped"], "not run": unknown}  # fmt: skip
    made["agrees"] = bool(counts["passed"]) and not bad and not unknown and "ended" in told
    made["failures"] = "; ".join(f"{test.partition('::')[2]}: {bad[test]}" for test in bad)[:1500]
    if not made["agrees"] and not bad:
        made["failures"] = failure or "no test passed"
    if name in OPTIONAL and tests and counts["skipped"] == len(tests) == told["count"]:
        made |= {"agrees": "not shown", "failures": ""}
    made["because"] = "; ".join(sorted(skipped))[:300]
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
