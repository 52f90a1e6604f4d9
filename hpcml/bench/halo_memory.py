"""How large an image trains under a limit of memory, by how many ranks divide it.

What fits is tried, by ranks that are threads (`hpcml.run`), as in `hpcml.bench.zero_limits`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import hpcml
from hpcml import memory
from hpcml.comm import Mesh
from hpcml.errors import MemoryLimitError, UserError
from hpcml.models import MeshNet
from hpcml.optim import SGD

GRIDS = ((1, 1), (1, 2), (2, 2))
CHANNELS, CLASSES = 3, 2
WIDTHS = (8, 16, 8)
STEP = 32
"""Sizes that are tried are multiples of it."""
_PATIENCE = 120


def run(limit: int) -> dict[str, Any]:
    """The largest image by grid, and what each rank keeps of an image that one rank can train.

    limit: bytes a rank, from 1 on.
    """
    if limit < 1:
        raise UserError(f"--memory-limit {limit}: give bytes, at least 1, such as 16M")
    rows: list[dict[str, Any]] = [
        {"grid": list(grid), "size": _largest(partial(fits, grid=grid, limit=limit))}
        for grid in GRIDS
    ]
    common = rows[0]["size"]
    for row in rows:
        row["activations"] = peak(common, (row["grid"][0], row["grid"][1])) if common else 0
    beyond = max(row["size"] for row in rows)
    if not beyond:
        raise UserError(
            f"--memory-limit {limit}: in so many bytes a rank no image of {STEP} x {STEP} trains, "
            "not even divided: give more"
        )
    refusal = "" if fits(beyond, GRIDS[0], limit) else f"{beyond} x {beyond} on one rank: refused"
    return {"limit": limit, "common": common, "rows": rows, "refusal": refusal}


def fits(size: int, grid: tuple[int, int], limit: int) -> bool:
    """Whether a step on an image of size x size keeps within `limit` bytes a rank."""

    def train() -> None:
        memory.set_limit(limit)
        _step(size, grid)

    try:
        hpcml.run(train, ranks=grid[0] * grid[1], timeout=_PATIENCE)
    except MemoryLimitError:  # of some rank: it ends those that would wait for it
        return False
    finally:
        gc.collect()
    return True


def peak(size: int, grid: tuple[int, int]) -> int:
    """The most bytes of activations that a rank has at once in a step."""

    def train() -> int:
        memory.account().reset_peak()
        _step(size, grid)
        return memory.account().peak["activations"]

    found: list[int] = hpcml.run(train, ranks=grid[0] * grid[1], timeout=_PATIENCE)
    gc.collect()
    return max(found)


def _step(size: int, grid: tuple[int, int]) -> None:
    mesh = Mesh(sp_h=grid[0], sp_w=grid[1])
    model = MeshNet(CHANNELS, CLASSES, (size, size), WIDTHS, 2)
    step = hpcml.parallelize(
        model, loss=hpcml.nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, mesh=mesh
    )
    image = np.zeros((1, CHANNELS, size, size), np.float32)
    step((image, np.zeros((1, size, size), np.int64)))


def _largest(good: Callable[[int], bool]) -> int:
    """The largest multiple of `STEP` for which `good` holds; 0 if there is none."""
    low, high = 0, STEP
    while good(high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def table(report: dict[str, Any]) -> str:
    """The report as a table to print."""
    from hpcml.bench.show import human

    first = report["rows"][0]
    rows = [["ranks", "largest image", "pixels", f"activations of {report['common']}^2", "part"]]
    for row in report["rows"]:
        ratio = (row["size"] / first["size"]) ** 2 if first["size"] else float("nan")
        rows.append([
            " x ".join(map(str, row["grid"])), f"{row['size']} x {row['size']}", f"{ratio:.2f} x",
            human(row["activations"]), f"{row['activations'] / max(first['activations'], 1):.3f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"MeshNet of widths {', '.join(map(str, WIDTHS))}, one image a step, "
        f"{human(report['limit'])} a rank"
    )
    return "\n".join([title, *lines, *filter(None, [report["refusal"]])])
