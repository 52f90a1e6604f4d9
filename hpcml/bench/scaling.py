"""Strong and weak scaling of a GPT training step over ranks and threads per rank.

Every combination of ranks and threads is a job of its own, and the jobs take turns: each of several
rounds starts all of them once, so that a machine that drifts drifts for all. A job's time is the
median of its steps, each as long as the slowest rank takes (`scaling_job`).

Strong: the batch of a step stays; weak: that of each rank does. In both, the speed-up is how many
times as many samples a second there are as with one rank of one thread in the same round, and the
efficiency that by ranks x threads. Spread is the least and the largest of the rounds.

Model FLOP utilisation (Chowdhery et al. 2022, "PaLM", appendix B): a token costs 6 N + 12 L H Q T
floating-point operations, with L layers, H heads of size Q, T tokens of context. N counts the
weights that are multiplied with: four matrices a layer and the one that makes logits; neither the
gains of layer norms nor tables as such. The masked half of attention counts, as in the paper,
although nobody computes it. The peak is the best rate of NumPy's products of float32 matrices in
this run, in as many processes of one thread at once as the step has ranks x threads.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from hpcml import backend
from hpcml.bench.products import shapes
from hpcml.bench.step import VOCAB, Size
from hpcml.errors import UserError

Job = Callable[..., "subprocess.CompletedProcess[str]"]
"""`job(ranks, arguments of python, env=..., **how of subprocess.run)`."""
Row = dict[str, Any]

KINDS = ("strong", "weak")
PRODUCTS = (1024, 2048)
"""Rows and columns of the matrices whose product is tried for the peak."""
_UNBOUND = {
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
"""For Open MPI, which would give each rank one core, whatever its threads."""


def run(
    size: Size, ranks: Sequence[int], threads: Sequence[int], rounds: int, job: Job
) -> dict[str, Any]:
    """Measure all combinations that have a core for every thread; the report as plain values.

    size: of the model and of the batch: in strong scaling that of all ranks, in weak of each. One
    rank of one thread is always measured: all else is compared to it.
    """
    from hpcml.train.environment import cpu, gemm_library, versions

    check(size, ranks, threads, rounds)
    cores = len(backend.cores())
    wanted = sorted({(1, 1), *((r, t) for r in ranks for t in threads)})
    measured = [(r, t) for r, t in wanted if r * t <= cores]
    found: dict[tuple[int, int], list[Row]] = {shape: [] for shape in measured}
    peaks: dict[int, list[float]] = {r * t: [] for r, t in measured}
    for _ in range(rounds):
        for count, rates in peaks.items():
            rates.append(sum(_job(job, count, 1, products=PRODUCTS)["gemm"]))
        for (r, t), results in found.items():
            results.append(_job(job, r, t, size=asdict(size)))
    peak = {count: max(rates) for count, rates in peaks.items()}
    return {
        "bench": "scaling",
        "version": 1,
        "size": asdict(size),
        "rounds": rounds,
        "cores": cores,
        "left_out": [shape for shape in wanted if shape not in found],
        "cpu": cpu(),
        "gemm": gemm_library(),
        "packages": versions(),
        "flops_per_token": flops_per_token(size),
        "peak": [{"cores": count, "flops_per_second": rate} for count, rate in peak.items()],
        "rows": [
            row(size, kind, shape, found[shape], found[1, 1], peak[shape[0] * shape[1]])
            for kind in KINDS
            for shape in measured
        ],
    }


def check(size: Size, ranks: Sequence[int], threads: Sequence[int], rounds: int) -> None:
    """Raise UserError for what cannot be measured."""
    numbers = {"--ranks": min(ranks), "--threads": min(threads), "--rounds": rounds,
               "--width": size.width, "--layers": size.layers, "--block": size.block}  # fmt: skip
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} {number}: must be at least 1")
    if size.width % size.heads:
        raise UserError(f"--width {size.width}: take a multiple of {size.heads}")
    if size.batch < max(ranks):
        raise UserError(f"--batch {size.batch}: {max(ranks)} ranks need a sample each")


def _job(job: Job, ranks: int, threads: int, **what: Any) -> Row:
    """Start a job and return what its first rank reports; `what`: a size, or products."""
    spec = {"threads": threads, **what}
    command = ["-m", "hpcml", "bench", "scaling", "--json", "--job", json.dumps(spec)]
    environment = {"OMP_NUM_THREADS": str(threads), **_UNBOUND}
    done = job(ranks, command, env=environment, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(
            f"--ranks {ranks} --threads {threads}: this job failed; what it said is above"
        )
    found: Row = json.loads(done.stdout)
    return found


def of_kind(size: Size, kind: str, ranks: int) -> Size:
    """What all ranks compute together in a step."""
    return replace(size, batch=size.batch * ranks) if kind == "weak" else size


def flops_per_token(size: Size) -> int:
    """Floating-point operations of forward and backward for a token, as the paper counts them."""
    weights = sum(n_in * n_out * count for _, n_in, n_out, count in shapes(size, VOCAB))
    return 6 * weights + 12 * size.layers * size.width * size.block  # H Q is the width


def row(
    size: Size, kind: str, shape: tuple[int, int], found: list[Row], alone: list[Row], peak: float
) -> Row:
    """What the jobs of one combination amount to.

    found, alone: their reports by round, and those of one rank of one thread. peak: in FLOP/s.
    """
    ranks, threads = shape
    batch = of_kind(size, kind, ranks).batch
    seconds = [result[kind]["seconds"] for result in found]
    first = [result[kind]["seconds"] for result in alone]
    speedup = [
        (batch / mine) / (size.batch / base) for mine, base in zip(seconds, first, strict=True)
    ]
    flops = flops_per_token(size) * batch * size.block
    memory = found[0][kind]["memory"]
    return {
        "kind": kind, "ranks": ranks, "threads": threads, "batch": batch,
        "seconds": spread(seconds),
        "samples_per_second": batch / statistics.median(seconds),
        "speedup": spread(speedup),
        "efficiency": spread([times / (ranks * threads) for times in speedup]),
        "compute_balance": spread([balance(result[kind]["compute"]) for result in found]),
        "memory": max(memory), "memory_balance": balance(memory),
        "utilisation": spread([flops / mine / peak for mine in seconds]),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def balance(values: Sequence[float]) -> float:
    """The largest by the mean: 1 where all ranks have the same."""
    return max(values) / statistics.fmean(values)
