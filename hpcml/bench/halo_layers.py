"""Time of divided convolutions by layer, beside the model of Dryden et al. 2019.

Their performance model takes for a layer the time of the convolution of a rank's block, measured by
its size, and adds messages of alpha + bytes beta for the halo: forward those of the input, backward
those of its gradient. Here the convolution alone is timed in turns with the divided layer, on what
a rank reads, and m messages of together b bytes count m alpha + b beta, as they all go at once.
Beside that the model has what a CPU does itself: the copy of a block to its place among its ghosts,
in both directions, and what a divided layer takes to be called, measured with tiny images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hpcml import nn
from hpcml.autograd import Tensor, no_grad
from hpcml.bench.rounds import Call, alternate
from hpcml.comm import Mesh
from hpcml.nn.images import convolve
from hpcml.parallel.spatial import Grid, divide
from hpcml.parallel.spatial.windows import windows_of


class Shape(NamedTuple):
    """A convolution of images, square ones."""

    name: str
    samples: int
    channels: int
    filters: int
    kernel: int
    stride: int
    size: int


SHAPES = (
    Shape("mesh 1", 1, 18, 32, 5, 2, 256),
    Shape("mesh 2", 1, 32, 32, 3, 1, 128),
    Shape("mesh 3", 1, 32, 48, 3, 2, 128),
    Shape("resnet stem", 2, 3, 64, 7, 2, 224),
    Shape("resnet 1", 2, 64, 64, 3, 1, 56),
    Shape("resnet 2", 2, 64, 128, 3, 2, 56),
    Shape("resnet 2 1x1", 2, 64, 128, 1, 2, 56),
    Shape("resnet 3", 2, 128, 128, 3, 1, 28),
)
"""Of the mesh-tangling problem and of ResNet, at sizes that a CPU takes in milliseconds."""
CALLS = (Shape("a call", 1, 1, 1, 1, 1, 8), Shape("with a halo", 1, 1, 1, 3, 1, 8))
"""Which take no time but that of being called, without and with a halo."""


def measure(mesh: Mesh, alpha: float, beta: float, rounds: int) -> list[dict[str, Any]]:
    """Each layer on this mesh's sp_h x sp_w; the slowest rank counts. Collective."""
    rest: dict[bool, tuple[float, float]] = {}
    for shape in CALLS:
        tiny = _row(mesh, shape, alpha, beta, rounds)
        rest[tiny["halo_bytes"] > 0] = (
            max(tiny["forward"] - tiny["forward_predicted"], 0.0),
            max(tiny["measured"] - tiny["predicted"], 0.0),
        )
    rows = [_row(mesh, shape, alpha, beta, rounds) for shape in SHAPES]
    for row in rows:
        forward, both = rest[row["halo_bytes"] > 0]
        row["forward_predicted"] += forward
        row["predicted"] += both
    return rows


def _row(mesh: Mesh, shape: Shape, alpha: float, beta: float, rounds: int) -> dict[str, Any]:
    layer = nn.Conv2d(shape.channels, shape.filters, shape.kernel, shape.stride, shape.kernel // 2)
    model = nn.Sequential(layer).name_parts()
    division = divide(model, nn.MSELoss(), mesh)
    random = np.random.default_rng(0)
    image = random.standard_normal((shape.samples, shape.channels, shape.size, shape.size))
    (block,) = division.inputs([image.astype(np.float32)])
    # Channels last in memory, as between layers.
    x = Tensor(np.ascontiguousarray(block.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), True)
    read, pads = _read(layer, division.grid, x)
    g = np.ones(model(x).shape, np.float32)

    def alone(x: Tensor) -> Tensor:
        return convolve("bench", x, layer.weight, layer.bias, layer.stride, pads, 1, 1)

    def forward(run: Any, x: Tensor) -> Call:
        def call() -> None:
            with no_grad():
                run(x)

        return call

    calls: dict[str, Call] = {
        "forward": forward(model, x),
        "forward alone": forward(alone, read),
        "both": lambda: model(x).backward(g),
        "both alone": lambda: alone(read).backward(g),
    }
    halo = windows_of(layer, division.grid, division.grid.whole).exchange.halo
    own = np.ascontiguousarray(block.transpose(0, 2, 3, 1))
    wide = np.empty(halo.padded(own.shape), own.dtype)

    def copy() -> None:
        wide[halo.inside(wide.ndim)] = own

    calls["copy"] = copy
    before = mesh.ledger.snapshot()
    calls["both"]()
    found = (mesh.ledger.snapshot() - before).get(division.grid.axis.name, {})
    moved = found["halo"].bytes if "halo" in found else 0
    times = {name: float(np.median(some)) for name, some in alternate(
        mesh.world, calls, rounds).items()}  # fmt: skip
    ghosts, messages = _halo(layer, division.grid, x)
    mine = np.array([messages * alpha + ghosts * beta, 2 * messages * alpha + moved * beta, moved])
    sends = mesh.world.allreduce(mine, "max")
    copied = times["copy"] if sends[2] else 0.0
    return {
        **shape._asdict(), "grid": [axis.size for axis in division.grid.axes(2)],
        "block": list(block.shape[2:]), "halo_bytes": int(sends[2]),
        "forward_predicted": times["forward alone"] + copied + float(sends[0]),
        "forward": times["forward"],
        "predicted": times["both alone"] + 2 * copied + float(sends[1]), "measured": times["both"],
        "halo_predicted": float(sends[1]),
    }  # fmt: skip


def _read(layer: nn.Conv2d, grid: Grid, x: Tensor) -> tuple[Tensor, Any]:
    """What a rank reads for its block of the output, and how it is padded."""
    with no_grad():
        grid.enter(x)
        local = windows_of(layer, grid, grid.whole)
        read = local.exchange(x)
    return Tensor(read.data, True), local.pads


def _halo(layer: nn.Conv2d, grid: Grid, x: Tensor) -> tuple[int, int]:
    """Bytes of ghosts that a rank gets forward, and from how many others."""
    exchange = windows_of(layer, grid, grid.whole).exchange
    if not exchange.moves:
        return 0, 0
    return exchange.ghosts * x.shape[0] * x.shape[1] * x.dtype.itemsize, exchange.messages


def table(report: dict[str, Any]) -> str:
    """The rows as a table to print."""
    from hpcml.bench.show import human, seconds

    rows = [["layer", "samples", "channels", "kernel", "block of a rank", "halo", "predicted",
             "measured", "ratio", "both predicted", "measured", "ratio"]]  # fmt: skip
    for row in report["layers"]:
        kernel = f"{row['kernel']}x{row['kernel']}" + (f"/{row['stride']}" * (row["stride"] > 1))
        rows.append([
            row["name"], str(row["samples"]), f"{row['channels']} to {row['filters']}", kernel,
            " x ".join(map(str, row["block"])), human(row["halo_bytes"]),
            seconds(row["forward_predicted"]), seconds(row["forward"]),
            f"{row['forward'] / row['forward_predicted']:.2f}",
            seconds(row["predicted"]), seconds(row["measured"]),
            f"{row['measured'] / row['predicted']:.2f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    grid = " x ".join(map(str, report["layers"][0]["grid"]))
    title = (
        f"convolutions divided over sp_h x sp_w = {grid}: forward, and forward with both backward "
        "passes, beside the block alone, alpha and beta for its halo, its copy and the call"
    )
    return "\n".join([title, *lines])
