"""GPUs: CuPy, the devices it sees and which rank takes which, and MPI on their memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hpcml.cli.doctor.child import Outcome
from hpcml.cli.doctor.host import size
from hpcml.cli.doctor.report import Row
from hpcml.kernels.cuda.paths import PATHS

INSTALL = "pip install 'hpcml[cuda13]' (or cuda12 for an older driver)"


def driver_devices(folder: str = "/proc/driver/nvidia/gpus") -> str:
    """Return how many GPUs NVIDIA's driver shows; an empty string for none."""
    count = len(list(Path(folder).glob("*")))
    return f"{count} NVIDIA GPU{'s' * (count > 1)}" if count else ""


def installed() -> bool:
    """Whether CuPy can be found, without importing it."""
    return importlib.util.find_spec("cupy") is not None


def cupy(outcome: Outcome | None) -> list[Row]:
    """Return CuPy and its GPUs; `None`: it is not installed."""
    if outcome is None:
        found = driver_devices()
        gpus = Row("gpus", "warn", f"{found}, not used without CuPy", INSTALL)
        return [
            Row("cupy", "absent", "not installed: CPU only"),
            gpus if found else Row("gpus", "absent", "no GPU"),
        ]
    if not outcome.found:
        return [
            Row("cupy", "warn", outcome.failure, "install the CuPy that matches the driver's CUDA"),
            Row("gpus", "absent", "no GPU that CuPy can use"),
        ]
    version = Row("cupy", "ok", outcome.found["version"])
    devices: list[dict[str, Any]] = outcome.found["devices"]
    if not devices:
        return [version, Row("gpus", "absent", "no GPU")]
    value = "; ".join(
        f"{number}: {device['name']} ({size(device['bytes'])}, {device['capability']})"
        for number, device in enumerate(devices)
    )
    broken = [str(n) for n, device in enumerate(devices) if not device["works"]]
    if broken:
        remedy = "leave them out with CUDA_VISIBLE_DEVICES"
        return [version, Row("gpus", "warn", f"{value}; wrong sums on {', '.join(broken)}", remedy)]
    return [version, Row("gpus", "ok", value)]


def operators() -> list[Row]:
    """Return which way each operator takes on a GPU, and why."""
    return [Row(f"gpu: {name}", "ok", f"{way}: {why}") for name, (way, why) in PATHS.items()]


def chosen(ranks: list[dict[str, Any]]) -> Row:
    """Return which GPU each rank of the small job takes."""
    if not ranks or any(rank["device"] is None for rank in ranks):
        return Row("devices of ranks", "absent", "no GPU")
    value = ", ".join(f"rank {number}: {rank['device']}" for number, rank in enumerate(ranks))
    return Row("devices of ranks", "ok", value)


def device_buffers(outcome: Outcome | None) -> Row:
    """Return whether MPI takes memory of the GPU; `None`: there is none to try."""
    name = "mpi on gpu memory"
    if outcome is None:
        return Row(name, "absent", "no GPU")
    if outcome.found.get("send") and outcome.found.get("allreduce"):
        return Row(name, "ok", "send and all-reduce work")
    remedy = "buffers go through the host: slower, but right; a CUDA-aware MPI avoids that"
    if outcome.found.get("send"):
        return Row(name, "warn", "send works, all-reduce gives wrong sums", remedy)
    return Row(name, "absent", outcome.failure or "send gives wrong values", remedy)
