"""`hpcml doctor`: what this machine and its MPI can do, and what to do about what it cannot.

The doctor's own process never initialises MPI, compiles or touches a GPU: probes are child jobs
with a time limit, so that a crash or a hang is a row of the report.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from hpcml.cli.doctor import cells, communication, gpu, host, mpi, report
from hpcml.cli.doctor.communication import Results
from hpcml.cli.doctor.mpi import probe
from hpcml.cli.doctor.report import Row
from hpcml.comm import direct
from hpcml.comm.child import Outcome, find_mpiexec


def run(args: list[str]) -> int:
    """Print the report; return 1 if something essential failed. One rank of a job does it."""
    from hpcml.cli import first_rank

    parser = argparse.ArgumentParser("hpcml doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    if not first_rank():
        return 0
    rows, results = examine()
    if options.json:
        print(report.as_json(rows, communication.plain(results)))
    else:
        if sys.stdout.isatty():
            report.show(rows)
        else:
            print(report.as_text(rows))
        if results:
            print("", *communication.table(results), sep="\n")
    return 0 if report.healthy(rows) else 1


def examine() -> tuple[list[Row], Results]:
    """Return all findings, and how every kind of call went."""
    rows = [
        host.python(),
        host.numpy(),
        host.numba(probe("numba")),
        host.blas(probe("blas"), host.cpu_flags()),
        host.cores(),
        host.shared_memory(),
    ]
    library = probe("library")
    mpiexec = find_mpiexec()
    rows += mpi.library(library) + mpi.launchers(mpiexec)
    ranks = []
    can_start = False
    if library.found and mpiexec:
        job = mpi.start(mpiexec, "ranks")
        job_rows = mpi.job(job)
        rows += job_rows
        ranks = job.found.get("ranks", [])
        can_start = job_rows[0].status == "ok"
    devices = probe("cupy") if gpu.installed() else None
    rows += [*gpu.cupy(devices), gpu.chosen(ranks)]
    some = bool(devices is not None and devices.found.get("devices"))
    tried = direct.probe() if some and can_start else None
    rows.append(gpu.messages(tried, *_with_a_wheels_ucx(tried, library)))
    rows += gpu.operators(probe("cudnn")) if some else []
    results: Results = {}
    if can_start:
        for device in (False, True)[: 1 + some]:
            start = partial(mpi.try_cells, mpiexec, gpu.way(tried))
            results |= communication.survey(start, cells.plan(device))
        rows += communication.rows(results)
    return rows, results


def _with_a_wheels_ucx(tried: Outcome | None, library: Outcome) -> tuple[Outcome | None, str]:
    """What came of trying GPU messages with the UCX of a wheel, and how one does that."""
    recipe = direct.recipe()
    if tried is None or tried.found or not recipe:
        return None, ""
    other = "MPIR_" if "Open MPI" in str(library.found) else "OMPI_"
    names = [name for name in recipe if not name.startswith(other)]
    return direct.probe(recipe), " ".join(f"{name}={recipe[name]}" for name in names)
