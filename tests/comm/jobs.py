"""How tests start jobs of their own: as from a shell, whatever launcher the tests run under."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hpcml.comm.launch import without_launcher

ROOT = Path(__file__).resolve().parents[2]

Job = Callable[..., subprocess.Popen[str]]
"""`job(ranks, program, *arguments, **environment)`, see the fixture `job`."""


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


def python(
    *arguments: object, ranks: int = 0, cwd: Path | None = None, timeout: float = 90, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end, under mpiexec if `ranks` > 0."""
    launcher = [mpiexec(), "-n", str(ranks)] if ranks else []
    return subprocess.run(
        [*launcher, sys.executable, *map(str, arguments)],
        env=child_environment(**env), cwd=cwd, text=True, capture_output=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def printed(script: Path, ranks: int = 0, timeout: float = 60) -> str:
    """What a script prints that must run without a warning."""
    done = python("-W", "error", script, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
