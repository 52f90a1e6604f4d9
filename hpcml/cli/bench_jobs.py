"""The benchmarks that start jobs of their own, `start` and `scaling`, and how jobs are started."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hpcml.comm import launch
from hpcml.errors import UserError
from hpcml.pictures import check_picture


def add_start(add: Callable[..., Any]) -> None:
    """Add `hpcml bench start`; add(name, measure, show, text) makes a command."""
    text = "import, and the first step of a run with and without compiled kernels"
    start = add("start", _start, _show_start, text)
    start.add_argument("--ranks", dest="most", type=int, default=2, help="ranks at once (2)")


def add_scaling(add: Callable[..., Any]) -> None:
    """Add `hpcml bench scaling`."""
    text = "strong and weak scaling of a GPT training step over ranks and threads"
    scaling = add("scaling", _scaling, _show_scaling, text)
    scaling.add_argument("--ranks", dest="jobs", nargs="+", type=int, default=[1, 2])
    scaling.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of each rank")
    for name, default in (("width", 384), ("layers", 4), ("block", 256), ("batch", 8)):
        scaling.add_argument(f"--{name}", type=int, default=default, help=f"of the GPT ({default})")
    scaling.add_argument("--rounds", type=int, default=3, help="in which each job starts once (3)")
    scaling.add_argument("--plot", metavar="FILE", help="draw the efficiency")
    scaling.add_argument("--job", help=argparse.SUPPRESS)  # what a job of this benchmark is told


def job(
    ranks: int, args: list[str], env: Mapping[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run python with these arguments, under mpiexec where there are several ranks.

    env: what differs in the environment.
    """
    if launch.read().size > 1:
        raise UserError("this benchmark starts jobs of its own: start it without a launcher")
    width = shutil.get_terminal_size((120, 24)).columns  # the ranks have no terminal
    environment = launch.without_launcher() | {"COLUMNS": str(width)} | dict(env or {})
    command = [sys.executable, *args]
    if ranks > 1:
        mpiexec, permissive = _launcher()
        command, environment = [mpiexec, "-n", str(ranks), *command], environment | permissive
    sys.stdout.flush()
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, check=False, text=True, **how
    )


def _launcher() -> tuple[str, dict[str, str]]:
    """The mpiexec to use, and what it needs in the environment."""
    from hpcml.comm.child import PERMISSIVE, find_mpiexec

    mpiexec = find_mpiexec()
    if not mpiexec:
        raise UserError("no mpiexec in PATH: install an MPI library: pip install 'hpcml[mpich]'")
    return mpiexec, PERMISSIVE


def _start(options: argparse.Namespace) -> dict[str, Any]:
    from hpcml.bench import start

    return start.run(options.most, job)


def _show_start(report: dict[str, Any]) -> None:
    from hpcml.bench import start

    print(start.table(report))


def _scaling(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import scaling, scaling_show
    from hpcml.bench.step import Size

    if options.job:
        return _scaling_job(json.loads(options.job))
    heads = max(options.width // 64, 1)
    size = Size(options.layers, heads, options.width, options.block, options.batch)
    if options.plot:
        check_writable(options.plot)
        check_picture(options.plot)
    report = scaling.run(size, options.jobs, options.threads, options.rounds, job)
    if options.plot:
        scaling_show.plot(report, options.plot)
    return report


def _scaling_job(spec: dict[str, Any]) -> dict[str, Any] | None:
    from hpcml import backend
    from hpcml.bench import scaling_job
    from hpcml.bench.step import Size
    from hpcml.comm import Mesh

    mesh = Mesh()
    backend.set_threads(spec["threads"])
    if "products" in spec:
        found = scaling_job.gemm(mesh, spec["products"])
    else:
        found = scaling_job.run(mesh, Size(**spec["size"]))
    return found if mesh.rank == 0 else None


def _show_scaling(report: dict[str, Any]) -> None:
    from hpcml.bench import scaling_show

    print(scaling_show.table(report))


def check_writable(path: str) -> None:
    """Raise UserError for a file that cannot be written, before anything is measured."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: name a file in a folder that can")
