"""Convolutions of ResNet's layers, forward and both backward passes, and a step of ResNet-18.

Beside PyTorch's (oneDNN) in one process, turn by turn, images channels last in both. A ratio is the
median over rounds of that within a round; the mean over shapes and passes is geometric.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import hpcml
from hpcml import kernels
from hpcml.backend import Array
from hpcml.bench.rounds import Call, alternate, geometric_mean, ratio
from hpcml.bench.step import CHECKED, begin, largest, weights_of
from hpcml.comm import Mesh
from hpcml.comm.guard import agree
from hpcml.models import ResNet
from hpcml.nn import CrossEntropyLoss

BATCH = 16
PASSES = ("forward", "data", "filter")
"""Of the output, of the gradient of the images, of the gradient of the filters."""
STEP = (64, 3, 32, 32)
"""Shape of a batch of the whole step."""
CLASSES = 10
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A convolution with square images and filters, padded by half of the filter."""

    channels: int
    filters: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}-{self.filters} {self.kernel}x{self.kernel}{step} {self.size}"

    @property
    def out(self) -> int:
        """Size of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of a pass."""
        return 2 * BATCH * self.out**2 * self.filters * self.channels * self.kernel**2


SHAPES = (
    Shape(3, 64, 7, 2, 224),
    Shape(64, 64, 3, 1, 56), Shape(128, 128, 3, 1, 28),
    Shape(256, 256, 3, 1, 14), Shape(512, 512, 3, 1, 7),
    Shape(64, 128, 3, 2, 56), Shape(128, 256, 3, 2, 28), Shape(256, 512, 3, 2, 14),
    Shape(64, 128, 1, 2, 56), Shape(128, 256, 1, 2, 28), Shape(256, 512, 1, 2, 56),
    Shape(64, 256, 1, 1, 56), Shape(256, 64, 1, 1, 56),
    Shape(128, 512, 1, 1, 28), Shape(512, 128, 1, 1, 28),
    Shape(256, 1024, 1, 1, 14), Shape(512, 2048, 1, 1, 7),
)  # fmt: skip
"""Those of ResNet-18 and 50 on images of 224 x 224 (He et al. 2016, table 1)."""


def run(mesh: Mesh, part: str, peer: str = "", rounds: int = 0) -> dict[str, Any]:
    """Measure with one thread a rank; the report as plain values. Collective.

    part: "shapes", on one rank, or "step". peer: "torch" to compare with PyTorch. rounds: how
    often, 0 for as many as a second allows.
    """
    report = agree(mesh.world, partial(begin, part, peer, 1, mesh.size))
    report |= {"bench": "conv", "version": 1}
    if part == "step":
        return report | {"rows": [_step(mesh, peer, rounds)]}
    rows = [row for shape in SHAPES for row in _shape(shape, peer, rounds)]
    means = {}
    if peer:
        for name in PASSES:
            means[name] = geometric_mean([row["ratio"] for row in rows if row["pass"] == name])
        means["all"] = geometric_mean([row["ratio"] for row in rows])
    return report | {"batch": BATCH, "rows": rows, "means": means}


def _shape(shape: Shape, peer: str, rounds: int) -> list[Row]:
    """Time the passes of a shape, each beside the peer's."""
    random = np.random.default_rng(0)
    x, g = (
        random.standard_normal((BATCH, n, n, c), np.float32)
        for n, c in ((shape.size, shape.channels), (shape.out, shape.filters))
    )
    w = random.standard_normal((shape.filters, shape.channels, *(shape.kernel,) * 2), np.float32)
    ours, results = passes(shape, x, w, g)
    theirs: Mapping[str, Any] = {}
    if peer:
        from hpcml.bench import torch_conv

        theirs = torch_conv.passes(shape, x, w, g)
    rows = []
    for name in PASSES:
        calls: dict[str, Call] = {"ours": ours[name]}
        if peer:
            calls["peer"] = theirs[name]
        times = alternate(Mesh().world, calls, rounds)
        row: Row = {"shape": str(shape), "pass": name, "flops": shape.flops}
        row |= {who: float(np.median(seconds)) for who, seconds in times.items()}
        if peer:
            expected = theirs[name]()
            row["difference"] = float(abs(results[name] - expected).max() / abs(expected).max())
            row["ratio"] = ratio(times, "ours", "peer")
        rows.append(row)
    return rows


def passes(shape: Shape, x: Array, w: Array, g: Array) -> tuple[dict[str, Call], dict[str, Array]]:
    """The kernel of each pass as layers call it, and where its result is, in our order."""
    k, none = kernels.images(x), np.empty(0, x.dtype)
    pair = (shape.kernel // 2,) * 2
    how = (shape.stride,) * 2, pair, (1, 1), 1
    results = {"forward": np.empty_like(g), "data": np.empty_like(x), "filter": np.empty_like(w)}
    calls: dict[str, Call] = {
        "forward": partial(k.convolve, x, w, none, *how, results["forward"]),
        "data": partial(k.convolve_input_gradient, g, w, none, *how, results["data"]),
        "filter": partial(k.convolve_weight_gradient, g, x, *how, results["filter"]),
    }
    return calls, results


def _step(mesh: Mesh, peer: str, rounds: int) -> Row:
    """Time a training step of ResNet-18 with the stem for small images, from equal weights.

    Each rank has a batch of its own, the peer's in DistributedDataParallel on gloo. Collective.
    """
    random, count = np.random.default_rng(0), STEP[0] * mesh.size
    batch = (
        random.standard_normal((count, *STEP[1:]), np.float32),
        random.integers(0, CLASSES, count),
    )
    step = hpcml.parallelize(
        ResNet(STEP[1], CLASSES, small_images=True), loss=CrossEntropyLoss(), mesh=mesh,
        optimizer=hpcml.optim.SGD, **SGD,
    )  # fmt: skip
    calls: dict[str, Call] = {"ours": partial(step, batch)}
    row: Row = {"batch": list(STEP)}
    gloo = None
    if peer:
        from hpcml.bench import torch_conv
        from hpcml.bench.gloo_peer import GlooPeer

        gloo = GlooPeer(mesh, 1) if mesh.size > 1 else None
        mine = slice(mesh.rank * STEP[0], (mesh.rank + 1) * STEP[0])
        own = batch[0][mine], batch[1][mine]
        calls["peer"] = torch_conv.step(weights_of(step), own, CLASSES, SGD, among=mesh.size > 1)
        losses = np.array([calls["peer"]() for _ in range(CHECKED)])
        means = mesh.world.allreduce(losses) / mesh.size
        row["loss_difference"] = largest(means.tolist(), [step(batch) for _ in range(CHECKED)])
    times = alternate(mesh.world, calls, rounds)
    row |= {who: float(np.median(seconds)) for who, seconds in times.items()}
    if peer:
        row["ratio"] = ratio(times, "ours", "peer")
    if gloo:
        del calls  # what lies over ranks must be gone before the group of processes ends
        gc.collect()
        gloo.close()
    return row


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    peer = report["peer"]
    beside = f" beside {peer} {report['packages'][peer]}" if peer else ""
    ranks = f"{report['ranks']} rank{'s'[: report['ranks'] > 1]}"
    title = f"convolutions, fp32, {ranks} of 1 thread, {report['cpu']}{beside}"
    if report["part"] == "step":
        (row,) = report["rows"]
        line = f"step of ResNet-18 on {row['batch']} a rank: {row['ours'] * 1e3:.1f} ms"
        if peer:
            line += (
                f", {peer} {row['peer'] * 1e3:.1f} ms, ratio {row['ratio']:.2f}, "
                f"difference of losses {row['loss_difference']:.1e}"
            )
        return f"{title}\n{line}"
    names = [row["shape"] for row in report["rows"] if row["pass"] == PASSES[0]]
    lines = [title, "ms, GF/s" + (f", times as fast as {peer}" if peer else "")]
    lines.append(" " * 20 + "".join(f"{name:>22}" for name in PASSES))
    for name in names:
        cells = [
            f"{row['ours'] * 1e3:8.2f} {row['flops'] / row['ours'] * 1e-9:6.0f}"
            + (f" {row['ratio']:6.2f}" if peer else " " * 7)
            for row in report["rows"] if row["shape"] == name
        ]  # fmt: skip
        lines.append(f"{name:20}" + "".join(cells))
    if peer:
        means = report["means"]
        each = "".join(f"{means[name]:22.2f}" for name in PASSES)
        lines.append(f"{'geometric mean':20}{each}, of all {means['all']:.3f}")
    return "\n".join(lines)
