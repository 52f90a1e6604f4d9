"""A GPT training step, timed, beside the same step in PyTorch.

Here one rank measures; a job of several is measured by `step_ranks`, the memory that a step takes
by `step_memory`. All contenders run in one process, turn by turn, so that a machine that drifts
drifts for all; a ratio is the median of those within rounds. The products of matrices in the step
take turns of their own, because the two libraries call different BLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import hpcml
from hpcml import backend, kernels
from hpcml.bench import products
from hpcml.bench.rounds import Call, alternate, ratio
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel import Step

VOCAB = 65
CHECKED = 3
"""Steps whose losses are compared: from the second on they tell of the update as well."""
_REST = 0.15
"""Seconds before a turn where threads are several: OpenBLAS's wait for work with a busy core each
for 0.1 s, which another contender's would have to share."""

Row = dict[str, Any]


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


SIZES = {
    "small": Size(4, 4, 128, 64, 12),
    "medium": Size(6, 6, 384, 256, 16),
    "large": Size(12, 12, 768, 256, 4),
}


def batch_of(size: Size) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random tokens and the tokens that follow them."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (size.batch, size.block + 1))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def our_step(
    size: Size, precision: str = "fp32", tie_embeddings: bool = True, **options: Any
) -> Step:
    """The step under test, with clipping and AdamW; `options` are those of `parallelize`."""
    model = GPT(
        VOCAB, size.block, size.layers, size.heads, size.width, bias=False,
        tie_embeddings=tie_embeddings,
    )  # fmt: skip
    return hpcml.parallelize(
        model.to(backend.dtype(precision)), loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW,
        lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), **{"grad_clip": 1.0, **options},
    )  # fmt: skip


def weights_of(step: Step) -> dict[str, np.ndarray[Any, Any]]:
    """A copy of each parameter by name, for a peer to begin with. Collective."""
    return {name: np.array(values) for name, values in step.gathered()}


def tried(make: Callable[[], Callable[[], float]]) -> tuple[Call, list[float]]:
    """Make a step of the peer's; it, and its losses on the first `CHECKED` calls.

    Raises UserError with one short line where the peer cannot do it, whatever it raises itself.
    """
    try:
        call = make()
        return call, [call() for _ in range(CHECKED)]
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError((lines or [type(error).__name__])[0][:100]) from error


def rounds_for(size: Size) -> int:
    """Enough rounds for a median, in about a minute."""
    return 60 if size.width <= 128 else 11 if size.width <= 384 else 7


def rest_for(threads: int) -> float:
    """Seconds to rest before a turn."""
    return _REST if threads > 1 else 0.0


def begin(
    part: str, peer: str, threads: int, ranks: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Give both libraries their threads; what a report begins with.

    Raises UserError where the peer is not installed.
    """
    from hpcml.train.environment import blas, cpu, gemm_library, versions

    backend.set_threads(threads)
    kernels.compiled("float32")  # first: it keeps every MKL of the process to one thread
    found: dict[str, Any] = {
        "bench": "step", "version": 3, "part": part, "peer": peer, "ranks": ranks,
        "threads": threads, "precision": precision, "cpu": cpu(),
        "gemm": gemm_library(precision),
        "blas": blas(),  # before a peer loads its own
        "packages": versions(),
    }  # fmt: skip
    if peer:
        from hpcml.bench import torch_peer

        torch_peer.set_threads(threads)
        found["packages"][peer] = torch_peer.VERSION
    return found


def run(
    sizes: Sequence[str], peer: str = "", threads: int = 1, rounds: int = 0,
    compiled: bool = False, precision: str = "fp32",
) -> dict[str, Any]:  # fmt: skip
    """Measure on one rank; the report as plain values.

    sizes: names of `SIZES`. peer: "torch" for PyTorch on the same weights and batch. rounds: how
    often, 0 for `rounds_for`. compiled: also what `torch.compile` makes of the peer's model.
    precision: of parameters and activations, "fp32" or "bf16"; ours has float32 masters for bf16.
    """
    report = begin("time", peer, threads, 1, precision)
    how = (peer, threads, rounds, compiled, precision)
    return report | {"rows": [measure(SIZES[name], *how) for name in sizes]}


def measure(
    size: Size, peer: str = "", threads: int = 1, rounds: int = 0, compiled: bool = False,
    precision: str = "fp32",
) -> Row:  # fmt: skip
    """Time one size: medians in seconds by contender, and how many times as fast ours is."""
    mesh = Mesh()
    step, batch = our_step(size, precision, mesh=mesh), batch_of(size)
    shapes = products.shapes(size, VOCAB)
    ours = products.ours(shapes, precision)
    calls: dict[str, Call] = {"ours": partial(step, batch), "gemm_ours": ours}
    row: Row = {"size": str(size)}
    if peer:
        from hpcml.bench import torch_peer

        weights = weights_of(step)
        plain = partial(torch_peer.step, size, weights, batch, VOCAB, precision)
        calls["peer"], losses = tried(plain)
        calls["gemm_peer"] = products.alternating(torch_peer.products(shapes, precision))
        row["loss_difference"] = largest(losses, [step(batch) for _ in range(CHECKED)])
        if compiled:
            try:
                calls["compiled"], same = tried(partial(plain, compiled=True))
                row["loss_difference"] = max(row["loss_difference"], largest(losses, same))
            except UserError as error:
                row["not_built"] = str(error)
    times = alternate(mesh.world, calls, rounds or rounds_for(size), rest_for(threads))
    row |= {name: float(np.median(seconds)) for name, seconds in times.items()}
    if peer:
        row["ratio"] = ratio(times, "ours", "peer")
        row["gemm_ratio"] = ratio(times, "gemm_ours", "gemm_peer")
    if "compiled" in times:
        row["compiled_ratio"] = ratio(times, "ours", "compiled")
    return row


def largest(some: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of losses."""
    return max(abs(one - other) for one, other in zip(some, others, strict=True))
