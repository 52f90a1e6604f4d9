"""GPUs: CuPy, the devices it sees and which rank takes which, and MPI on their memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hpcml.cli.doctor.host import size
from hpcml.cli.doctor.report import Row, Status
from hpcml.comm import direct
from hpcml.comm.child import Outcome
from hpcml.kernels.cuda.paths import paths

INSTALL = "pip install 'hpcml[cuda13]' (or cuda12 for an older driver)"
UCX = (
    "an MPI that takes GPU memory avoids the copies: that of the site, or for MPI from a wheel "
    "pip install 'hpcml[cuda13]', whose UCX is built with CUDA, then hpcml doctor again"
)


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


def operators(tried: Outcome) -> list[Row]:
    """Return which way each operator takes on a GPU, and why; `tried`: cuDNN's examples."""
    failed = dict.fromkeys(("attention", "convolution"), tried.failure)
    found = paths(tried.found or {"left": failed})
    return [Row(f"gpu: {name}", "ok", f"{way}: {why}") for name, (way, why) in found.items()]


def chosen(ranks: list[dict[str, Any]]) -> Row:
    """Return which GPU each rank of the small job takes."""
    if not ranks or any(rank["device"] is None for rank in ranks):
        return Row("devices of ranks", "absent", "no GPU")
    value = ", ".join(f"rank {number}: {rank['device']}" for number, rank in enumerate(ranks))
    return Row("devices of ranks", "ok", value)


def messages(outcome: Outcome | None, helped: Outcome | None = None, command: str = "") -> Row:
    """Return which way messages of a GPU's arrays take, and why; `None`: there is no GPU.

    helped: what came of the trial in the environment that `command` sets, if there is one.
    """
    name = "gpu messages"
    if outcome is None:
        return Row(name, "absent", "no GPU")
    at_once = way(outcome) == "device"
    value = "given to MPI as they are" if at_once else "by way of pinned host memory"
    tried = f"MPI on GPU memory: {_tried(outcome)}"
    asked = direct.asked()
    because = f"{direct.VARIABLE}={asked}; " if asked != "auto" else ""
    if outcome.found:
        return Row(name, "ok", f"{value} ({because}{tried})")
    if helped is not None and helped.found:
        remedy = f"start with {command} mpiexec ...: then MPI takes them ({_tried(helped)})"
    elif helped is not None:
        remedy = f"no help: with {command} MPI on GPU memory fails too ({_tried(helped)})"
    else:
        remedy = UCX
    status: Status = "fail" if at_once else "warn"
    return Row(name, status, f"{value} ({because}{tried})", remedy)


def way(outcome: Outcome | None) -> str:
    """Return which way messages of a GPU's arrays take: "device" or "staged"."""
    asked = direct.asked()
    if asked != "auto":
        return asked
    return "device" if outcome is not None and outcome.found else "staged"


def _tried(outcome: Outcome) -> str:
    if not outcome.found:
        return outcome.failure
    first, second = outcome.found["devices"]
    return f"tried between devices {first} and {second}, right"
