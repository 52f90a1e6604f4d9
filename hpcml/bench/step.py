"""A GPT training step, timed, beside the same step in PyTorch.

Both run in one process on one thread, turn by turn, so that a machine that drifts drifts for both;
the ratio is that of the medians. The products of matrices in the step are timed alone as well,
because the two libraries call different BLAS.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

import hpcml
from hpcml import backend, kernels
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel import Step

VOCAB = 65


@dataclass(frozen=True)
class Size:
    """A GPT and its batch."""

    layers: int
    heads: int
    width: int
    block: int
    batch: int

    def __str__(self) -> str:
        return f"({self.layers}, {self.width}, {self.block}, {self.batch})"


SIZES = (Size(4, 4, 128, 64, 12), Size(6, 6, 384, 256, 16), Size(12, 12, 768, 256, 4))


@dataclass
class Row:
    """Medians in seconds; `ratio` is the peer's time by ours, gemm_* the matrix products alone."""

    size: str
    ours: float
    gemm_ours: float
    peer: float | None = None
    gemm_peer: float | None = None
    ratio: float | None = None
    loss_difference: float | None = None


def batch_of(size: Size) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random tokens and the tokens that follow them."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size.batch, size.block + 1))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def our_step(size: Size, precision: str = "fp32", **options: Any) -> Step:
    """The step under test, with clipping and AdamW; `options` are those of `parallelize`."""
    model = GPT(VOCAB, size.block, size.layers, size.heads, size.width, bias=False)
    return hpcml.parallelize(
        model.to(backend.dtype(precision)), loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW,
        lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), grad_clip=1.0, **options,
    )  # fmt: skip


def products(size: Size) -> list[tuple[int, int, int, int]]:
    """The matrix products of a forward pass, (rows, in, out, how many): x (rows, in) by weights."""
    rows, c, n = size.batch * size.block, size.width, size.layers
    layer = [(rows, c, 3 * c, n), (rows, c, c, n), (rows, c, 4 * c, n), (rows, 4 * c, c, n)]
    return [*layer, (rows, c, VOCAB, 1)]


def our_products(size: Size) -> list[tuple[Callable[[], Any], int]]:
    """The step's matrix products as `linear` calls them: forward, and both of backward."""
    calls: list[tuple[Callable[[], Any], int]] = []
    for rows, n_in, n_out, count in products(size):
        x, w, g = _operands(rows, n_in, n_out)
        k = kernels.of(x)
        calls.append((partial(k.linear, x, w, np.empty_like(g)), count))
        calls.append((partial(k.linear_input_gradient, g, w, np.empty_like(x)), count))
        calls.append((partial(k.linear_weight_gradient, g, x, np.empty_like(w)), count))
    return calls


def _operands(rows: int, n_in: int, n_out: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    shapes = ((rows, n_in), (n_out, n_in), (rows, n_out))
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def alternate(calls: list[Callable[[], Any]], rounds: int, warmup: int = 2) -> list[list[float]]:
    """Seconds of each call in each round, the calls taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + warmup):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number >= warmup:
                seconds.append(time.perf_counter() - start)
    return times


def total(calls: list[tuple[Callable[[], Any], int]], rounds: int = 5) -> float:
    """Sum of the medians, each as often as it occurs in a step."""
    medians = [statistics.median(t) for t in alternate([call for call, _ in calls], rounds, 1)]
    return sum(median * count for median, (_, count) in zip(medians, calls, strict=True))


def measure(size: Size, peer: str, rounds: int) -> Row:
    """Time one size; with peer="torch" beside PyTorch on the same weights and batch."""
    step, batch = our_step(size), batch_of(size)
    calls: list[Callable[[], Any]] = [lambda: step(batch)]
    if not peer:
        (ours,) = alternate(calls, rounds)
        return Row(str(size), statistics.median(ours), total(our_products(size)))
    if peer != "torch":
        raise UserError(f'--peer="{peer}" is unknown: use torch')
    from hpcml.bench import torch_peer

    other = torch_peer.step(size, step.model.state_dict(), batch, VOCAB)
    difference = abs(step(batch) - other())
    ours, theirs = alternate([*calls, other], rounds)
    row = Row(str(size), statistics.median(ours), total(our_products(size)))
    row.peer = statistics.median(theirs)
    row.gemm_peer = total(torch_peer.products(products(size)))
    row.ratio, row.loss_difference = row.peer / row.ours, difference
    return row


def rounds_for(size: Size) -> int:
    """Enough rounds for a median, in about a minute."""
    return 60 if size.width <= 128 else 11 if size.width <= 384 else 7


def run(peer: str = "") -> dict[str, Any]:
    """Measure all sizes on one thread; the report as plain values."""
    from hpcml.train.environment import blas, cpu, gemm_library, versions

    backend.set_threads(1)
    before = blas()  # before a peer loads its own
    rows = [measure(size, peer, rounds_for(size)) for size in SIZES]
    return {
        "bench": "step",
        "version": 1,
        "peer": peer,
        "threads": 1,
        "cpu": cpu(),
        "gemm": gemm_library(),
        "blas": before,
        "packages": versions(),
        "rows": [asdict(row) for row in rows],
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table to print."""
    numpys = report["blas"][0] if report["blas"] else {}
    heads = ["(layers, width, block, batch)", "hpcml ms", "GEMM"]
    if report["peer"]:
        heads += [f"{report['peer']} ms", "GEMM", "ratio", "GEMM ratio"]
    rows = [heads]
    for row in report["rows"]:
        cells = [row["size"], f"{row['ours'] * 1e3:.1f}", f"{row['gemm_ours'] / row['ours']:.0%}"]
        if report["peer"]:
            share = row["gemm_peer"] / row["peer"]
            cells += [f"{row['peer'] * 1e3:.1f}", f"{share:.0%}", f"{row['ratio']:.2f}",
                      f"{row['gemm_peer'] / row['gemm_ours']:.2f}"]  # fmt: skip
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"one training step, fp32, 1 thread, {report['cpu']}; GEMM by {report['gemm']}; NumPy's "
        f"BLAS: {numpys.get('internal_api')} {numpys.get('version')} ({numpys.get('architecture')})"
    )
    return "\n".join([title, *lines])
