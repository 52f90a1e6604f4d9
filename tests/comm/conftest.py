"""What the tests of communication share: a lone axis, an axis over all ranks, child jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpcml.comm import Axis, Mesh
from tests.comm.jobs import Job, child_environment, mpiexec


@pytest.fixture(params=["alone", pytest.param("ranks", marks=pytest.mark.mpi)])
def axis(request: pytest.FixtureRequest) -> Axis:
    """An axis of size 1 without MPI, and, under mpiexec, one along all ranks."""
    return Axis("solo") if request.param == "alone" else Mesh()["dp"]


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
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout:
            process.stdout.close()
