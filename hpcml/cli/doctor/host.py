"""The machine and what computes on its CPU: Python, NumPy, BLAS, numba, cores, shared memory."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcml.cli.doctor.report import Row
from hpcml.comm.child import Outcome

SHM_LOW = 1 << 28
"""Below this many bytes of shared memory a middling model's gradients do not fit."""

_AVX512 = {"SkylakeX", "Cooperlake", "SapphireRapids"}
_AVX2 = {"Haswell", "Zen", *_AVX512}


def python() -> Row:
    """Return which Python runs."""
    return Row("python", "ok", f"{platform.python_version()} ({sys.executable})")


def numpy() -> Row:
    """Return which NumPy is used."""
    return Row("numpy", "ok", np.__version__)


def cores() -> Row:
    """Return the CPU and the cores this process may use."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    if not hasattr(os, "sched_getaffinity"):
        return Row("cores", "ok", f"{os.cpu_count()}, {name}")
    mask = sorted(os.sched_getaffinity(0))
    return Row("cores", "ok", f"{len(mask)} of {os.cpu_count()} ({spans(mask)}), {name}")


def numba(outcome: Outcome) -> Row:
    """Return numba's version and where compiled kernels are kept."""
    found = outcome.found
    if not found.get("works"):
        return Row("numba", "fail", outcome.failure or "compiles wrongly", "pip install -U numba")
    if not found["kept"]:
        return Row(
            "numba", "warn", f"{found['version']}, compiled kernels are not kept",
            "set HPCML_CACHE_DIR to a folder that can be written, or every start compiles",
        )  # fmt: skip
    kernels = f"kernels kept in {found['cache']}, GEMM by {found['gemm']}"
    return Row("numba", "ok", f"{found['version']}, {kernels}")


def blas(outcome: Outcome, flags: set[str], environ: Mapping[str, str] = os.environ) -> Row:
    """Return NumPy's BLAS, its kernel and threads; warn if the CPU could run a faster kernel."""
    if not outcome.found.get("works"):
        return Row("blas", "fail", outcome.failure or "multiplies wrongly", "pip install -U numpy")
    libraries: list[dict[str, Any]] = outcome.found["libraries"]
    if not libraries:
        return Row(
            "blas", "warn", "not one that threadpoolctl knows: threads per rank cannot be set",
            "set its number of threads to 1, or take NumPy's own wheel",
        )  # fmt: skip
    first = libraries[0]
    kernel = first["architecture"] or "unknown"
    value = f"{first['internal_api']} {first['version']}, kernel {kernel}"
    value += f", {first['num_threads']} threads in one process (hpcml divides products itself)"
    better = faster_kernel(kernel, flags) if first["internal_api"] == "openblas" else ""
    if better:
        preset = environ.get("OPENBLAS_CORETYPE")
        return Row(
            "blas", "warn", f"{value}; the CPU has {better}",
            f"OPENBLAS_CORETYPE={preset} presets it: unset it" if preset else "update NumPy",
        )  # fmt: skip
    return Row("blas", "ok", value)


def faster_kernel(kernel: str, flags: set[str]) -> str:
    """Return the vector unit that an OpenBLAS kernel leaves unused, or an empty string."""
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags and kernel not in _AVX512:
        return "AVX-512"
    if {"avx2", "fma"} <= flags and kernel not in _AVX2:
        return "AVX2"
    return ""


def cpu_flags() -> set[str]:
    """Return what an x86 CPU says it can do, in Linux's words; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def shared_memory(folder: str = "/dev/shm") -> Row:
    """Return the room for memory that the ranks of a node share."""
    if not os.path.isdir(folder):
        return Row("shared memory", "absent", f"no {folder} on this system")
    state = os.statvfs(folder)
    free, total = state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize
    value = f"{size(free)} free of {size(total)} in {folder}"
    left = _cgroup_room()
    if left is not None and left < free:
        value += f", of which this control group may take {size(left)}"
        free = left
    if free < SHM_LOW:
        return Row(
            "shared memory", "warn", value,
            "give a container more (docker run --shm-size=8g), or remount /dev/shm larger",
        )  # fmt: skip
    return Row("shared memory", "ok", value)


def _cgroup_room() -> int | None:
    """Return the bytes that the control group's memory limit leaves; None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdecimal() else None


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def spans(numbers: list[int]) -> str:
    """Return sorted numbers as ranges, such as "0-3,8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
