"""What a communication thread hides of an all-reduce beside compute, and what it costs.

Every rank multiplies matrices for a while and reduces a buffer: one after the other, and with the
reduction started before the compute and waited for after it. Hidden is
1 - (both - compute) / communication: 1 if the reduction took no time, 0 if nothing was gained, and
negative if doing both at once was slower than one after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml.comm import Axis, Mesh

MEBI = 1 << 20
SIZES = (1 * MEBI, 4 * MEBI, 16 * MEBI)
_WIDTH = 384
_ROUNDS = 9
_SHARE = 0.7
"""Time of the communication as a part of that of the compute: it could be hidden altogether."""


def run(mesh: Mesh, rounds: int = 0) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective.

    Seconds are medians over rounds, each of the slowest rank. All ranks compute, or rank 0 alone
    while the others only take part in the reduction: their cores are the spare ones.
    """
    from hpcml.train.environment import cpu, versions

    axis = mesh.world
    busy = ("all ranks", "rank 0")
    rows = [_measure(axis, size, rounds or _ROUNDS, who) for who in busy for size in SIZES]
    return {
        "bench": "overlap",
        "version": 1,
        "ranks": mesh.size,
        "nodes": len({node.index for node in mesh.nodes}),
        "cpu": cpu(),
        "versions": versions(),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"overlap: {report['ranks']} ranks on {report['nodes']} node(s), {report['cpu']}",
        "computing   MiB  compute ms  all-reduce ms  both ms  hidden",
    ]
    lines += [
        f"{row['computing']:9} {row['bytes'] / MEBI:5g} {1e3 * row['compute']:11.2f} "
        f"{1e3 * row['communication']:14.2f} {1e3 * row['both']:8.2f} {row['hidden']:7.0%}"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def _measure(axis: Axis, size: int, rounds: int, busy: str) -> dict[str, Any]:
    """One row: a buffer of `size` bytes beside compute that takes somewhat longer."""
    computes = busy == "all ranks" or axis.rank == 0
    x = np.zeros(size // 4, np.float32)
    a, b, c = (np.full((_WIDTH, _WIDTH), 1e-3, np.float32) for _ in range(3))
    count = 0

    def compute() -> None:
        for _ in range(count if computes else 0):
            np.matmul(a, b, out=c)

    def reduce() -> None:
        axis.iallreduce(x, out=x).wait()

    def both() -> None:
        request = axis.iallreduce(x, out=x)
        compute()
        request.wait()

    for _ in range(2):  # the thread, its communicator, fresh pages
        reduce()
    communication = statistics.median(_timed(axis, reduce) for _ in range(3))
    count = 10
    one = statistics.median(_timed(axis, compute) for _ in range(3)) / count
    count = max(1, round(communication / _SHARE / one))
    times: dict[str, list[float]] = {"compute": [], "communication": [], "both": []}
    for _ in range(rounds):  # in turn, so that a drift of the machine meets all three
        times["compute"].append(_timed(axis, compute))
        times["communication"].append(_timed(axis, reduce))
        times["both"].append(_timed(axis, both))
    medians = {name: statistics.median(found) for name, found in times.items()}
    hidden = 1 - (medians["both"] - medians["compute"]) / medians["communication"]
    return {"bytes": size, "computing": busy, **medians, "hidden": hidden}


def _timed(axis: Axis, call: Callable[[], None]) -> float:
    """Seconds of a call, from a common start until the slowest rank is done."""
    axis.barrier()
    start = time.perf_counter()
    call()
    return float(axis.allreduce(np.array([time.perf_counter() - start]), "max")[0])
