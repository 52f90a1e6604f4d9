"""What the tests of communication share: a lone axis, an axis over all ranks, child jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcml.comm import Axis, Mesh
from hpcml.comm.launch import without_launcher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["alone", pytest.param("ranks", marks=pytest.mark.mpi)])
def axis(request: pytest.FixtureRequest) -> Axis:
    """An axis of size 1 without MPI, and, under mpiexec, one along all ranks."""
    return Axis("solo") if request.param == "alone" else Mesh()["dp"]


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a child job: nothing of a launcher, this checkout importable."""
    clean = without_launcher(os.environ)
    slurm = [name for name in clean if name.startswith("SLURM_")]
    for name in slurm:
        del clean[name]
    path = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH", "")]))
    return {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def mpiexec() -> str:
    """The mpiexec beside this Python, or the one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec") or "mpiexec"


Job = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def job() -> Iterator[Job]:
    """Start `job(ranks, program, *arguments)` under mpiexec, or alone with 0 ranks."""
    started: list[subprocess.Popen[str]] = []

    def start(ranks: int, program: str, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        launcher = [mpiexec(), "-n", str(ranks)] if ranks else []
        process = subprocess.Popen(
            [*launcher, sys.executable, "-c", program, *arguments],
            env=child_environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
        if process.stdout:
            process.stdout.close()
