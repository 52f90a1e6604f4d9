"""`hpcml doctor`: what this machine and its MPI can do, and what to do about what it cannot.

The doctor's own process never initialises MPI, compiles or touches a GPU: probes are child jobs
with a time limit, so that a crash or a hang is a row of the report.
"""

from __future__ import annotations

import argparse
import sys

from hpcml.cli.doctor import gpu, host, mpi, report
from hpcml.cli.doctor.child import probe
from hpcml.cli.doctor.report import Row


def run(args: list[str]) -> int:
    """Print the report; return 1 if something essential failed. One rank of a job does it."""
    from hpcml.cli import first_rank

    parser = argparse.ArgumentParser("hpcml doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    if not first_rank():
        return 0
    rows = examine()
    if options.json:
        print(report.as_json(rows))
    elif sys.stdout.isatty():
        report.show(rows)
    else:
        print(report.as_text(rows))
    return 0 if report.healthy(rows) else 1


def examine() -> list[Row]:
    """Return all findings."""
    rows = [
        host.python(),
        host.numpy(),
        host.numba(probe("numba")),
        host.blas(probe("blas"), host.cpu_flags()),
        host.cores(),
        host.shared_memory(),
    ]
    library = probe("library")
    mpiexec = mpi.find_mpiexec()
    rows += mpi.library(library) + mpi.launchers(mpiexec)
    ranks = []
    can_start = bool(library.found and mpiexec)
    if can_start:
        job = mpi.start(mpiexec, "ranks", library.found["library"])
        rows += mpi.job(job)
        ranks = job.found.get("ranks", [])
    devices = probe("cupy") if gpu.installed() else None
    rows += [*gpu.cupy(devices), gpu.chosen(ranks)]
    some = devices is not None and devices.found.get("devices")
    buffers = (
        mpi.start(mpiexec, "device_buffers", library.found["library"])
        if some and can_start
        else None
    )
    return [*rows, gpu.device_buffers(buffers)]
