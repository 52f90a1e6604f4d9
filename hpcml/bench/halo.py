"""Halo exchange in 1, 2 and 3 dimensions beside what the linear model of messages lets expect.

A rank that receives m messages with b bytes together needs about m alpha + b beta, alpha and beta
measured in the same run by sending an array to and fro. The exchange packs and unpacks ghosts that
do not lie side by side, and copies the block into its place among them: what it takes above the
estimate is that, and the copy alone is timed too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from hpcml.bench import halo_layers
from hpcml.bench.rounds import Call, alternate
from hpcml.comm import Axis, Mesh
from hpcml.comm.halo import Halo
from hpcml.comm.halo_plan import Cut

AXES = ("sp_d", "sp_h", "sp_w")
BLOCKS = {1: (1 << 12, 1 << 16, 1 << 20), 2: (64, 256, 1024), 3: (16, 32, 64)}
"""Cells of a rank's block along each dim that is cut, by the number of such dims."""
WIDTHS = (1, 3)
CHANNELS = 4

_LARGE = 1 << 20


def split(ranks: int, dims: int) -> tuple[int, ...]:
    """Ranks along each of so many dims, as even as can be, the first dims having more."""
    sizes = [1] * dims
    rest, prime, primes = ranks, 2, []
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    for prime in reversed(primes):
        sizes[int(np.argmin(sizes))] *= prime
    return tuple(sorted(sizes, reverse=True))


def run(mesh: Mesh, rounds: int = 0, layers: bool = False) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective.

    layers: divided convolutions (`hpcml.bench.halo_layers`) instead of exchanges alone.
    """
    from hpcml.train.environment import cpu, versions

    alpha, beta = messages(mesh.world, rounds)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    if layers:
        sizes = split(mesh.size, 2)
        found = halo_layers.measure(Mesh(sp_h=sizes[0], sp_w=sizes[1]), alpha, beta, rounds)
    for dims, blocks in () if layers else BLOCKS.items():
        sizes = split(mesh.size, dims)
        grid = Mesh(layout=dict(zip(AXES, sizes, strict=False)))
        cases = [(block, width) for block in blocks for width in WIDTHS]
        rows += [measure(grid, sizes, *case, rounds, alpha, beta) for case in cases]
    return {
        "bench": "halo",
        "version": 1,
        "ranks": mesh.size,
        "nodes": len({node.index for node in mesh.nodes}),
        "cpu": cpu(),
        "packages": versions(),
        "alpha": alpha,
        "beta": beta,
        "channels": CHANNELS,
        "dtype": "float32",
        "rows": rows,
        "layers": found,
    }


def messages(axis: Axis, rounds: int) -> tuple[float, float]:
    """Seconds to start a message and for each byte of it, between the first and the last rank.

    Half of the time to and fro, of 8 bytes and of 1 MiB. Collective.
    """
    small, large = np.zeros(8, np.uint8), np.zeros(_LARGE, np.uint8)

    def to_and_fro(x: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        last = axis.size - 1
        if axis.rank == 0:
            axis.send(x, last)
            axis.recv(x, last)
        elif axis.rank == last:
            axis.recv(x, 0)
            axis.send(x, 0)

    calls: dict[str, Call] = {"8": partial(to_and_fro, small), "1M": partial(to_and_fro, large)}
    times = alternate(axis, calls, rounds)
    few, many = (float(np.median(times[name])) / 2 for name in calls)
    return few, max(0.0, many - few) / _LARGE


def measure(
    mesh: Mesh,
    sizes: tuple[int, ...],
    block: int,
    width: int,
    rounds: int,
    alpha: float,
    beta: float,
) -> dict[str, Any]:
    """Time one exchange of blocks with `block` cells in each of the dims that are cut."""
    dims = len(sizes)
    axes = zip(AXES, sizes, strict=False)
    cuts = {k - dims: Cut(name, block * size, width=width) for k, (name, size) in enumerate(axes)}
    halo = Halo(mesh, cuts)
    x = np.zeros((CHANNELS, *(block,) * dims), np.float32)
    out = np.zeros(halo.padded(x.shape), np.float32)
    before = mesh.ledger.snapshot()
    halo.exchange(x, out)
    counts = (mesh.ledger.snapshot() - before).get(halo.axis.name, {})
    received = counts["halo"].bytes if counts else 0
    inside = out[halo.inside(x.ndim)]
    calls: dict[str, Call] = {
        "exchange": lambda: halo.exchange(x, out),
        "copy": lambda: np.copyto(inside, x),
    }
    times = alternate(mesh.world, calls, rounds)
    number = len(halo.plan.receives)
    worst = mesh.world.allreduce(np.array([number * alpha + received * beta, received]), "max")
    return {
        "grid": list(sizes),
        "block": block,
        "width": width,
        "bytes": int(worst[1]),
        "seconds": float(np.median(times["exchange"])),
        "copy": float(np.median(times["copy"])),
        "estimate": float(worst[0]),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table to print."""
    from hpcml.bench.show import human, seconds

    rows = [["ranks", "block of a rank", "width", "ghosts", "exchange", "estimate", "copy alone"]]
    for row in report["rows"]:
        cells = "x".join([str(report["channels"]), *[str(row["block"])] * len(row["grid"])])
        rows.append(
            ["x".join(map(str, row["grid"])), cells, str(row["width"]), human(row["bytes"]),
             seconds(row["seconds"]), seconds(row["estimate"]), seconds(row["copy"])]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"halo exchange, {report['dtype']}, {report['ranks']} ranks on {report['nodes']} node(s), "
        f"{report['cpu']}; a message takes {seconds(report['alpha'])} "
        f"and {report['beta'] * 1e9:.3f} ns per byte"
    )
    if report["layers"]:
        return f"{title}\n\n{halo_layers.table(report)}"
    return "\n".join([title, *lines])
