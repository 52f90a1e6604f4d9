"""Convolutions of ResNet's layers, forward and both backward passes, and a step of ResNet-18.

Beside PyTorch's (oneDNN) in one process, turn by turn, images channels last in both, with and
without Winograd's method. A ratio is the median over rounds of that within a round; the mean over
shapes and passes is geometric.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
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
from hpcml.nn import CrossEntropyLoss, use_winograd
from hpcml.parallel import Step

BATCH = 16
OURS = ("ours", "winograd")
"""What is compared with the peer; the second wherever that does something else."""
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
    means = {who: _means(rows, who) for who in OURS} if peer else {}
    return report | {"batch": BATCH, "rows": rows, "means": means}


def _means(rows: Sequence[Row], who: str) -> Row:
    """How many times as fast as the peer, by pass and over all."""
    passes = {name: [row for row in rows if row["pass"] == name] for name in PASSES}
    return {
        name: geometric_mean([row["ratio"].get(who, row["ratio"]["ours"]) for row in some])
        for name, some in {**passes, "all": rows}.items()
    }


def _shape(shape: Shape, peer: str, rounds: int) -> list[Row]:
    """Time the passes of a shape, each beside the peer's."""
    random = np.random.default_rng(0)
    x, g = (
        random.standard_normal((BATCH, n, n, c), np.float32)
        for n, c in ((shape.size, shape.channels), (shape.out, shape.filters))
    )
    w = random.standard_normal((shape.filters, shape.channels, *(shape.kernel,) * 2), np.float32)
    who = OURS if _differs(shape) else OURS[:1]
    ours = {one: passes(shape, x, w, g, one == "winograd") for one in who}
    theirs: Mapping[str, Any] = {}
    if peer:
        from hpcml.bench import torch_conv

        theirs = torch_conv.passes(shape, x, w, g)
    rows = []
    for name in PASSES:
        calls: dict[str, Call] = {one: ours[one][0][name] for one in who}
        if peer:
            calls["peer"] = theirs[name]
        times = alternate(Mesh().world, calls, rounds)
        row: Row = {"shape": str(shape), "pass": name, "flops": shape.flops}
        row |= {one: float(np.median(seconds)) for one, seconds in times.items()}
        if peer:
            expected = theirs[name]()
            row["difference"] = {
                one: float(abs(ours[one][1][name] - expected).max() / abs(expected).max())
                for one in who
            }
            row["ratio"] = {one: ratio(times, one, "peer") for one in who}
        rows.append(row)
    return rows


def _differs(shape: Shape) -> bool:
    """Whether Winograd's method computes this shape."""
    from hpcml.kernels.cpu.images.winograd import fits

    weight = shape.filters, shape.channels, *(shape.kernel,) * 2
    return fits(weight, (shape.stride,) * 2, (1, 1), 1, (shape.out,) * 2)


def passes(
    shape: Shape, x: Array, w: Array, g: Array, winograd: bool = False
) -> tuple[dict[str, Call], dict[str, Array]]:
    """The kernel of each pass as layers call it, and where its result is, in our order."""
    k, none = kernels.convolutions(x, winograd), np.empty(0, x.dtype)
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
    steps = {who: _made(mesh, who == "winograd") for who in OURS}
    calls: dict[str, Call] = {who: partial(step, batch) for who, step in steps.items()}
    row: Row = {"batch": list(STEP)}
    gloo = None
    if peer:
        from hpcml.bench import torch_conv
        from hpcml.bench.gloo_peer import GlooPeer

        gloo = GlooPeer(mesh, 1) if mesh.size > 1 else None
        mine = slice(mesh.rank * STEP[0], (mesh.rank + 1) * STEP[0])
        own = batch[0][mine], batch[1][mine]
        weights = weights_of(steps["ours"])
        calls["peer"] = torch_conv.step(weights, own, CLASSES, SGD, among=mesh.size > 1)
        losses = np.array([calls["peer"]() for _ in range(CHECKED)])
        means = mesh.world.allreduce(losses) / mesh.size
        row["loss_difference"] = {
            who: largest(means.tolist(), [step(batch) for _ in range(CHECKED)])
            for who, step in steps.items()
        }
    times = alternate(mesh.world, calls, rounds)
    row |= {who: float(np.median(seconds)) for who, seconds in times.items()}
    if peer:
        row["ratio"] = {who: ratio(times, who, "peer") for who in OURS}
    if gloo:
        del calls, steps  # what lies over ranks must be gone before the group of processes ends
        gc.collect()
        gloo.close()
    return row


def _made(mesh: Mesh, winograd: bool) -> Step:
    """The step of ResNet-18, with equal first weights each time. Collective."""
    model = ResNet(STEP[1], CLASSES, small_images=True)
    if winograd:
        use_winograd(model)
    return hpcml.parallelize(
        model, loss=CrossEntropyLoss(), mesh=mesh, optimizer=hpcml.optim.SGD, **SGD
    )


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    peer = report["peer"]
    beside = f" beside {peer} {report['packages'][peer]}" if peer else ""
    ranks = f"{report['ranks']} rank{'s'[: report['ranks'] > 1]}"
    title = f"convolutions, fp32, {ranks} of 1 thread, {report['cpu']}{beside}"
    if report["part"] == "step":
        return "\n".join([title, *_step_lines(report["rows"][0], peer)])
    lines = [title, "ms, GF/s" + (f", times as fast as {peer}; with winograd" if peer else "")]
    lines.append(" " * 20 + "".join(f"{name:>27}" for name in PASSES))
    for name in dict.fromkeys(row["shape"] for row in report["rows"]):
        cells = [_cell(row) for row in report["rows"] if row["shape"] == name]
        lines.append(f"{name:20}" + "".join(cells))
    for who, means in report["means"].items():
        each = "".join(f"{means[name]:27.2f}" for name in PASSES)
        what = "geometric mean" if who == "ours" else f"with {who}"
        lines.append(f"{what:20}{each}, of all {means['all']:.3f}")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    """Time and speed of a pass, and how it compares."""
    compared = row.get("ratio", {})
    each = "".join(f" {compared[who]:5.2f}" if who in compared else " " * 6 for who in OURS)
    return f"{row['ours'] * 1e3:9.2f} {row['flops'] / row['ours'] * 1e-9:5.0f}{each}"


def _step_lines(row: Row, peer: str) -> list[str]:
    """A line for each way of ours."""
    lines = []
    for who in OURS:
        line = f"step of ResNet-18 on {row['batch']} a rank"
        line += f"{', winograd' if who != 'ours' else ''}: {row[who] * 1e3:.1f} ms"
        if peer:
            line += (
                f", {peer} {row['peer'] * 1e3:.1f} ms, ratio {row['ratio'][who]:.2f}, "
                f"difference of losses {row['loss_difference'][who]:.1e}"
            )
        lines.append(line)
    return lines
