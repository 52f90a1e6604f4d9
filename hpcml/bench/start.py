"""How long a user waits: importing the package, and the first step of a run, cold and warm.

Cold is `hpcml train` with an empty `HPCML_CACHE_DIR`: the kernels are compiled. Warm is the same
again. Time counts from the start of the process (of mpiexec, for several ranks) until the record of
the first step is in `metrics.jsonl`: the job has one step and no validation, so the last change of
that file is it. Python's own cache of byte code is as it was; installing a package fills it.

That several ranks which start cold at once share the work is shown by what numba says of its cache
(NUMBA_DEBUG_CACHE): a kernel that was compiled is saved, by its file's name, and one that was not
is loaded. So no name may be saved twice in a job, ranks times as many must be loaded in the next,
and none saved.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcml import backend
from hpcml.errors import UserError

Job = Callable[..., "subprocess.CompletedProcess[str]"]
"""`job(ranks, arguments of python, env=..., **how of subprocess.run)`."""

CONFIG = """
[run]
steps = 1
log_every = 0

[data]
kind = "text"
val_fraction = 0.0

[model]
kind = "gpt"
layers = 1
heads = 2
width = 32
"""
"""The job, on the text that every machine has; one model compiles the same kernels as another."""

IMPORTS = ("hpcml", "hpcml.train.loop, hpcml.models, hpcml.parallel")
"""What is imported in fresh interpreters: the package, and all that a run needs of it."""
_IMPORTS, _WARM = 5, 3

_SAID = re.compile(r"\[cache\] data (saved to|loaded from) '([^']+)'")


def run(ranks: int, job: Job) -> dict[str, Any]:
    """Measure one rank and `ranks` at once; the report as plain values."""
    from hpcml.train.environment import cpu, versions

    if ranks < 1:
        raise UserError(f"--ranks {ranks}: start at least 1")
    rows = [row for count in sorted({1, ranks}) for row in starts(count, job)]
    return {
        "bench": "start",
        "version": 1,
        "cpu": cpu(),
        "cores": len(backend.cores()),
        "packages": versions(),
        "imports": [{"modules": names, "seconds": import_time(names)} for names in IMPORTS],
        "rows": rows,
    }


def import_time(names: str) -> float:
    """Seconds of `import names` in a fresh interpreter: the median of several."""
    program = (
        f"import time; start = time.perf_counter(); import {names}; "
        "print(time.perf_counter() - start)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                             check=True, stdin=subprocess.DEVNULL).stdout)
        for _ in range(_IMPORTS)
    ]  # fmt: skip
    return statistics.median(times)


def starts(ranks: int, job: Job) -> list[dict[str, Any]]:
    """Start a job of so many ranks once cold and a few times warm; a row of each kind."""
    with tempfile.TemporaryDirectory(prefix="hpcml-start-") as name:
        folder = Path(name)
        (folder / "job.toml").write_text(CONFIG)
        cold = _start(ranks, job, folder, 0)
        warm = [_start(ranks, job, folder, number + 1) for number in range(_WARM)]
        kernels = len(list((folder / "cache").rglob("*.nbc")))
    warmest = {key: statistics.median(row[key] for row in warm) for key in ("seconds", "whole")}
    worst = {key: max(row[key] for row in warm) for key in ("compiled", "twice")}
    least = {"loaded": min(row["loaded"] for row in warm)}
    return [
        {"start": "cold", "ranks": ranks, "jobs": 1, "kernels": kernels, **cold},
        {"start": "warm", "ranks": ranks, "jobs": _WARM, "kernels": kernels, **warmest, **worst,
         **least},
    ]  # fmt: skip


def _start(ranks: int, job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Run the job once: seconds to the first step and until it ended, and use of the cache."""
    results = folder / f"run-{number}"
    command = ["-m", "hpcml", "train", str(folder / "job.toml"), f"run.dir={results}"]
    environment = {
        "HPCML_CACHE_DIR": str(folder / "cache"),
        "NUMBA_DEBUG_CACHE": "1",
        "PYTHONUNBUFFERED": "1",  # what ranks say comes in whole pieces
        "OMP_NUM_THREADS": "1",
    }
    begun, start = time.time(), time.perf_counter()
    done = job(ranks, command, env=environment, stdout=subprocess.PIPE)
    whole = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"--ranks {ranks}: this job failed; what it said is above")
    seconds = (results / "metrics.jsonl").stat().st_mtime - begun
    return {"seconds": seconds, "whole": whole, **cache_use(done.stdout)}


def cache_use(said: str) -> dict[str, int]:
    """What all ranks did to the cache: kernels compiled, those of them more than once, loaded.

    said: what numba printed.
    """
    saved = Counter(name for what, name in _SAID.findall(said) if what == "saved to")
    loaded = sum(what == "loaded from" for what, _ in _SAID.findall(said))
    twice = sum(count > 1 for count in saved.values())
    return {"compiled": sum(saved.values()), "twice": twice, "loaded": loaded}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"start on {report['cores']} core(s), {report['cpu']}"]
    lines += [f"import {row['modules']}: {row['seconds']:.3f} s" for row in report["imports"]]
    lines.append("")
    lines.append("start  ranks  to the 1st step, s  whole, s  kernels  compiled  twice  loaded")
    lines += [
        f"{row['start']:5} {row['ranks']:6} {row['seconds']:19.2f} {row['whole']:9.2f} "
        f"{row['kernels']:8} {row['compiled']:9} {row['twice']:6} {row['loaded']:7}"
        for row in report["rows"]
    ]
    return "\n".join(lines)
