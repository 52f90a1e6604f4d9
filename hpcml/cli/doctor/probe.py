"""What the doctor's child processes do: `python -m hpcml.cli.doctor.probe NAME`.

Each probe returns what it found, which is printed as one line of JSON. They look below the package:
MPI is asked directly, by name, since `hpcml.comm` alone imports it for work.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[str, Any]


def library() -> Found:
    """Find which MPI library mpi4py loads, without initialising it."""
    mpi4py = importlib.import_module("mpi4py")
    mpi4py.rc.initialize = False
    mpi = importlib.import_module("mpi4py.MPI")
    return {
        "mpi4py": mpi4py.__version__,
        "library": " ".join(mpi.Get_library_version().strip("\0\n ").splitlines()[0].split()),
        "standard": list(mpi.Get_version()),
        "path": _loaded("libmpi"),
    }


def numba() -> Found:
    """Find whether numba compiles, where kernels are kept, and whose GEMM they call."""
    module = importlib.import_module("numba")
    double = module.njit(lambda x: x + x)
    from hpcml.kernels.cpu import blas, jit

    folder = jit.cache_folder()
    return {
        "version": module.__version__,
        "works": double(21) == 42,
        "cache": str(folder),
        "kept": not folder.name.startswith("hpcml-"),
        "gemm": blas.register()["s"],
    }


def blas() -> Found:
    """Find the BLAS that NumPy loaded, its kernel and threads, and whether it multiplies."""
    import threadpoolctl

    a = np.arange(12.0).reshape(3, 4)
    libraries = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]
    keys = ("internal_api", "version", "architecture", "num_threads")
    return {
        "works": bool(np.array_equal(a @ a.T, np.einsum("ik,jk->ij", a, a))),
        "libraries": [{key: info.get(key) for key in keys} for info in libraries],
    }


def ranks() -> Found:
    """Find what every rank of a job sees, and whether they can add numbers. Collective."""
    from hpcml.comm.world import neighbours

    mpi = importlib.import_module("mpi4py.MPI")
    world = mpi.COMM_WORLD
    total = np.empty(1000)
    world.Allreduce(np.full(1000, world.rank + 1.0), total)
    node = neighbours(mpi, world)
    mine = {
        "host": platform.node(),
        "local_rank": node.rank,
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "blas_threads": max([info["num_threads"] for info in blas()["libraries"]], default=1),
        "device": _device_of(node.rank),
    }
    levels = {
        mpi.THREAD_SINGLE: "SINGLE",
        mpi.THREAD_FUNNELED: "FUNNELED",
        mpi.THREAD_SERIALIZED: "SERIALIZED",
        mpi.THREAD_MULTIPLE: "MULTIPLE",
    }
    every = world.gather(mine)
    return {
        "size": world.size,
        "sums": bool((total == world.size * (world.size + 1) / 2).all()),
        "thread_level": levels[mpi.Query_thread()],
        "ranks": every,
    }


def cupy() -> Found:
    """Find CuPy and its GPUs, and whether each computes."""
    module = importlib.import_module("cupy")
    devices = []
    for number in range(module.cuda.runtime.getDeviceCount()):
        with module.cuda.Device(number):
            properties = module.cuda.runtime.getDeviceProperties(number)
            devices.append(
                {
                    "name": properties["name"].decode(),
                    "bytes": properties["totalGlobalMem"],
                    "capability": f"{properties['major']}.{properties['minor']}",
                    "works": int(module.arange(100).sum()) == 4950,
                }
            )
    return {"version": module.__version__, "devices": devices}


def cudnn() -> Found:
    """Find whether cuDNN computes small examples on the GPU, and why not."""
    from hpcml.kernels.cuda.paths import tried

    return tried()


def native_sum(dtype: str) -> str:
    """Say what comes of adding 16-bit floats by the MPI library itself. Collective."""
    from hpcml import backend

    mpi = importlib.import_module("mpi4py.MPI")
    x = np.ones(1 << 10, backend.dtype(dtype))
    known = getattr(mpi, "FLOAT16_T" if dtype == "float16" else "BFLOAT16_T", mpi.DATATYPE_NULL)
    if known == mpi.DATATYPE_NULL:  # not to be tried: some libraries die of it
        return "unknown to it"
    mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, [x.view(np.uint16), known], mpi.SUM)
    return "right" if (x.astype(np.float32) == mpi.COMM_WORLD.size).all() else "wrong"


def _device_of(local_rank: int) -> int | None:
    """Return the number of the GPU a rank takes, or None without CuPy or a GPU."""
    try:
        count = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    except Exception:  # noqa: BLE001 (CuPy without a driver raises its own kinds)
        return None
    return local_rank % count if count else None


def _loaded(name: str) -> str:
    """Return the path of a library in this process whose file is called so, or an empty string."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ""
    paths = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line]
    return next((path for path in paths if Path(path).name.startswith(name)), "")


PROBES: dict[str, Callable[[], Found]] = {
    probe.__name__: probe for probe in (library, numba, blas, ranks, cupy, cudnn)
}

if __name__ == "__main__":
    found = PROBES[sys.argv[1]]()
    if found.get("ranks", True) is not None and found:  # one rank speaks for a job
        print(json.dumps(found), flush=True)
