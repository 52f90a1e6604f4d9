"""The collectives: every algorithm beside the MPI library's own calls, in the same run.

Contenders are the calls of MPI by mpi4py ("MPI"), every registered algorithm that can serve the
call, our default choice ("auto"), and the same on memory from `Axis.empty` ("window"). All work on
one machine at one time, turn by turn (`hpcml.bench.rounds`). All-reduce, reduce, broadcast and
all-gather are in place. Of 16-bit floats, which MPI does not know how to add, the reductions of
"MPI" are those of as many float32.

For a payload of n bytes, as the ledger counts it, among p ranks:

- algorithm bandwidth is n by the time, bus bandwidth that times the factor of nccl-tests
  (`BUS_FACTORS`), which makes the bound of the hardware the same for any p;
- the share of the memory's bandwidth counts the bytes that a node's memory has to read and write at
  least, every buffer once (`TRAFFIC`), against the faster of copy and add of STREAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.backend import dtype as as_dtype
from hpcml.backend import is_half, to_kind
from hpcml.bench.mpi_peer import MpiPeer
from hpcml.bench.rounds import Call, alternate, geometric_mean, memory_bandwidth, ratio
from hpcml.comm import Axis, Mesh
from hpcml.comm.algorithms import OPERATIONS, Situation
from hpcml.comm.algorithms.choosing import fitting
from hpcml.comm.choice import Measurement, fit, save

Array = np.ndarray[Any, np.dtype[Any]]

BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda p: 2 * (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "allgather": lambda p: (p - 1) / p,
    "alltoall": lambda p: (p - 1) / p,
    "gather": lambda p: (p - 1) / p,
    "scatter": lambda p: (p - 1) / p,
    "broadcast": lambda p: 1.0,
    "reduce": lambda p: 1.0,
}
"""Bus bandwidth by algorithm bandwidth (PERFORMANCE.md of nccl-tests)."""

TRAFFIC: dict[str, Callable[[int], int]] = {
    "allreduce": lambda p: 2 * p,
    "reduce_scatter": lambda p: p + 1,
    "allgather": lambda p: p,
    "alltoall": lambda p: 2 * p,
    "gather": lambda p: 2,
    "scatter": lambda p: 2,
    "broadcast": lambda p: p,
    "reduce": lambda p: p + 1,
}
"""Bytes that the memory of one node has to read and write at least, by the payload."""

SIZES = tuple(4**k for k in range(5, 14))
"""1 KiB to 64 MiB."""

IN_WINDOWS = ("allreduce", "reduce_scatter", "allgather", "broadcast")
"""Operations that take place in memory from `Axis.empty`."""

LONG = 1 << 16
"""Bytes from which on sizes count in the means."""


class Case:
    """The arrays of one operation on this rank, for `axis.<operation>(x, out=out)`."""

    def __init__(
        self, operation: str, axis: Axis, count: int, empty: Callable[[int], Array]
    ) -> None:
        """`count` elements of payload, a multiple of the ranks, in arrays that `empty` makes."""
        part = count // axis.size
        self.operation, self.axis = operation, axis
        if operation == "allgather":
            self.out = empty(count)
            self.x = self.out[axis.rank * part : (axis.rank + 1) * part]
        elif operation in ("allreduce", "reduce", "broadcast"):
            self.x = self.out = empty(count)
        else:
            self.x = empty(part if operation == "gather" else count)
            self.out = empty(part if operation in ("reduce_scatter", "scatter") else count)
        self.payload = count * self.x.itemsize

    def check(self, name: str, call: Call) -> None:
        """Let every rank contribute its number and 1; raise `RuntimeError` for a wrong result."""
        self.fill(0)
        self.x[...] = self.axis.rank + 1
        call()
        if self.operation in ("reduce", "gather") and self.axis.rank > 0:
            return
        p = self.axis.size
        if self.operation in ("allreduce", "reduce", "reduce_scatter"):
            expected = np.full(1, p * (p + 1) / 2)
        elif self.operation in ("broadcast", "scatter"):
            expected = np.ones(1)
        else:
            expected = np.arange(1.0, p + 1)
        found = to_kind(self.out, "cpu").reshape(expected.size, -1).astype(np.float64)
        if not np.allclose(found, expected[:, None], rtol=1e-2):
            raise RuntimeError(f"{self.operation} by {name}: wrong at {self.payload} bytes")

    def fill(self, value: float) -> None:
        """Give all elements a value: sums of zeros stay in range, however often they are made."""
        self.x[...] = value
        self.out[...] = value

    def call(self, algorithm: str | None) -> Call:
        """The call of ours, by a named algorithm or the one that is chosen."""
        return partial(
            getattr(self.axis, self.operation), self.x, out=self.out, algorithm=algorithm
        )


def gloo(mesh: Mesh) -> Any:
    """PyTorch's collectives as one more contender, for `run`. Collective.

    Raises `UserError` where PyTorch is not installed.
    """
    from hpcml.bench.gloo_peer import GlooPeer

    return GlooPeer(mesh)


def run(
    mesh: Mesh,
    operations: Sequence[str] = OPERATIONS,
    dtype: str = "float32",
    sizes: Sequence[int] = SIZES,
    rounds: int = 0,
    gloo: Any = None,
) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective.

    Raises `RuntimeError` if a contender computes wrongly.
    """
    from hpcml.train.environment import cpu, versions

    axis, mpi = mesh["dp"], MpiPeer()
    bandwidth = memory_bandwidth(axis)
    rows = []
    for operation in operations:
        for size in sizes:
            rows += measure(axis, operation, size, as_dtype(dtype), rounds, mpi, gloo, bandwidth)
    if gloo:
        gloo.close()
    nodes = len({node.index for node in mesh.nodes})
    return {
        "bench": "collectives",
        "version": 1,
        "ranks": mesh.size,
        "nodes": nodes,
        "place": "network" if nodes > 1 else "node",
        "dtype": dtype,
        "mpi": mpi.library,
        "cpu": cpu(),
        "packages": versions(),
        "memory_bandwidth": bandwidth,
        "rows": rows,
        "means": means(rows),
    }


def measure(
    axis: Axis,
    operation: str,
    size: int,
    dtype: np.dtype[Any],
    rounds: int,
    mpi: MpiPeer,
    gloo: Any,
    bandwidth: dict[str, float],
) -> list[dict[str, Any]]:
    """Time all contenders for one payload of `size` bytes or a few more: a row each. Collective."""
    count = -(-size // (dtype.itemsize * axis.size)) * axis.size
    case = Case(operation, axis, count, partial(np.empty, dtype=dtype))
    window = Case(operation, axis, count, partial(axis.empty, dtype=dtype))
    calls = {"MPI": _mpi(case, mpi, count)}
    situation = Situation(
        nodes=tuple(node.index for node in axis.transport.nodes()),
        native=not is_half(dtype),
        ordered=is_half(dtype) and operation in ("allreduce", "reduce_scatter", "reduce"),
        vendor=True,
        shared=axis.shares_memory,
    )
    for name in [*fitting(operation, situation), None]:
        calls[name or "auto"] = case.call(name)
        case.check(name or "auto", calls[name or "auto"])
    if gloo and operation == "allreduce":
        calls["gloo"] = gloo.all_reduce(case.x)
        case.check("gloo", calls["gloo"])
    if operation in IN_WINDOWS and memory.owner_of(window.x) is not None:
        calls["window"] = window.call(None)
        window.check("window", calls["window"])
    case.fill(0)
    window.fill(0)
    times = alternate(axis, calls, rounds)
    rows = []
    for name in calls:
        seconds = float(np.median(times[name]))
        algbw = case.payload / seconds
        traffic = TRAFFIC[operation](axis.size) * case.payload
        rows.append(
            {
                "operation": operation,
                "algorithm": name,
                "bytes": case.payload,
                "seconds": seconds,
                "algbw": algbw,
                "busbw": BUS_FACTORS[operation](axis.size) * algbw,
                "memory_share": None
                if situation.spread
                else traffic / seconds / max(bandwidth.values()),
                "ratio": ratio(times, name, "MPI"),
            }
        )
    return rows


def _mpi(case: Case, mpi: MpiPeer, count: int) -> Call:
    """MPI's call for this case, on types that it knows."""
    operation = case.operation
    if not is_half(case.x.dtype):
        call = mpi.call(operation, case.x, case.out)
        case.check("MPI", call)
        return call
    if operation in ("allreduce", "reduce", "reduce_scatter"):
        wide = Case(operation, case.axis, count, partial(np.zeros, dtype=np.float32))
        call = mpi.call(operation, wide.x, wide.out)
        wide.check("MPI", call)
        wide.fill(0)
        return call
    call = mpi.call(operation, case.x.view(np.uint16), case.out.view(np.uint16))
    case.check("MPI", call)
    return call


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the ratios from 64 KiB on, by operation and algorithm."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        ratios = found.setdefault((row["operation"], row["algorithm"]), [])
        if row["bytes"] >= LONG:
            ratios.append(row["ratio"])
    return [
        {"operation": operation, "algorithm": name, "ratio": geometric_mean(ratios)}
        for (operation, name), ratios in found.items()
    ]


def save_fit(report: dict[str, Any], path: str) -> None:
    """Write the table of the fastest algorithms, to be named by `HPCML_COLLECTIVES`."""
    ours = {"MPI", "auto", "window", "gloo"}
    save(
        fit(
            Measurement(
                report["place"], report["ranks"], row["operation"], row["algorithm"],
                row["bytes"], row["seconds"],
            )
            for row in report["rows"]
            if row["algorithm"] not in ours
        ),
        path,
    )  # fmt: skip
