"""What the stages of ZeRO hold, move and cost, beside the formulas of the paper.

Rajbhandari et al. 2019, "ZeRO". A job of N ranks measures itself, in four parts:

- states: bytes a parameter of each rank's parameters, gradients and optimizer state from the
  account of memory, the peak of what is held for a moment above that, and the elements that a step
  communicates, from the ledger, by operation;
- time: of a step, by stage in turns, where every rank has a core;
- models: the largest model that fits (`zero_limits`);
- batches: the largest microbatch that fits, and what that does to speed (`zero_limits`).

Figures are those of the rank that has most.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hpcml import backend, memory
from hpcml.bench import zero_limits
from hpcml.bench.rounds import Call, alternate
from hpcml.bench.step import Size, batch_of, our_step
from hpcml.comm import Axis, Mesh
from hpcml.comm.alone import Alone
from hpcml.parallel import Step
from hpcml.parallel.states import STAGES, model_states

PARTS = ("states", "time", "models", "batches")
BLOCK, TIMED_BLOCK, TIMED_BATCH = 16, 256, 4
MICROBATCHES = (1, 4)
_NAIVE = (1, 2, 3)
"""Stages that the naive form has too."""


def run(
    mesh: Mesh, parts: Sequence[str] = PARTS, layers: int = 4, width: int = 384, rounds: int = 0
) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective.

    layers, width: of the GPT of the parts "states" and "time". rounds: of each timing; by default
    as many as a second allows, at least 5.
    """
    from hpcml.train.environment import cpu, versions

    backend.set_threads(1)
    size = Size(layers, width // 64 or 1, width, BLOCK, 1)
    report: dict[str, Any] = {"bench": "zero", "version": 1, "cpu": cpu(), "packages": versions(),
                              "layers": layers, "width": width}  # fmt: skip
    measures = {
        "states": lambda: states(mesh, size),
        "time": lambda: times(mesh, replace(size, block=TIMED_BLOCK, batch=TIMED_BATCH), rounds),
        "models": lambda: zero_limits.models(mesh),
        "batches": lambda: zero_limits.batches(mesh, rounds),
    }
    return report | {part: measures[part]() for part in PARTS if part in parts}


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The reports of jobs of several sizes as one."""
    first = reports[0]
    parts = {part: [row for r in reports for row in r[part]] for part in PARTS if part in first}
    return {**first, **parts}


def states(mesh: Mesh, size: Size) -> list[dict[str, Any]]:
    """Memory and traffic of all stages in both precisions, and of the naive form. Collective."""
    cases = [(precision, stage, "blocks") for precision in ("fp32", "bf16") for stage in STAGES]
    if mesh.size > 1:
        cases += [("fp32", stage, "layers") for stage in _NAIVE]
    return [row for case in cases for row in _states(mesh, size, *case)]


def _states(mesh: Mesh, size: Size, precision: str, stage: int, split: str) -> list[dict[str, Any]]:
    """A row for each number of microbatches a rank, of one sample each."""
    gc.collect()
    account, ranks = memory.account(), mesh.size
    before = dict(account.live)
    step = our_step(size, precision, mesh=mesh, zero=stage, zero_split=split, microbatch=1)
    params = sum(parameter.numel() for parameter in step.model.parameters())
    rows = []
    for microbatches in MICROBATCHES:
        batch = batch_of(replace(size, batch=microbatches * ranks))
        for _ in range(2):  # which show what is alive at once, and in which order
            step(batch)
        account.reset_peak()
        counted = mesh.ledger.snapshot()
        step(batch)
        moved = (mesh.ledger.snapshot() - counted).plain()
        held = {kind: account.live[kind] - before[kind] for kind in ("params", "grads", "optim")}
        itemsize = backend.dtype(precision).itemsize
        traffic = {
            operation: {
                name: count[name] / itemsize / params for name in ("bytes", "bytes_sent")
            }
            for counts in moved.values() for operation, count in counts.items()
        }  # fmt: skip
        rows.append({
            "ranks": ranks, "stage": stage, "precision": precision, "split": split,
            "microbatches": microbatches, "params": params,
            "states": {k: n / params for k, n in _largest(mesh.world, held).items()},
            "formula": model_states(stage, ranks, precision),
            **_largest(mesh.world, {"buffers": account.peak["buffers"] - before["buffers"]}),
            **_sizes(step, itemsize),
            "payload": {op: found["bytes"] for op, found in traffic.items()},
            "payload_formula": payload(stage, microbatches) if ranks > 1 else 0,
            **_largest(mesh.world, {"sent": sum(t["bytes_sent"] for t in traffic.values())}),
        })  # fmt: skip
    return rows


def payload(stage: int, microbatches: int) -> int:
    """Elements a parameter that a step moves, an all-reduce counted twice (the paper, section 7).

    Stages 2 and 3 reduce the gradients of every microbatch, stage 3 gathers twice for each.
    """
    return {2: microbatches + 1, 3: 3 * microbatches}.get(stage, 2)


def moved(row: dict[str, Any]) -> float:
    """The measured counterpart of `payload`, of a row of "states"."""
    payload: dict[str, float] = row["payload"]
    return payload.get("all_reduce", 0.0) + sum(payload.values())


def _sizes(step: Step, itemsize: int) -> dict[str, int]:
    """Bytes of the largest bucket and of the largest unit."""
    units: dict[int, int] = {}
    buckets = step.optimizer.storage.buckets
    for bucket in buckets:
        units[bucket.unit] = units.get(bucket.unit, 0) + bucket.size
    largest = max(bucket.size for bucket in buckets)
    return {"bucket": largest * itemsize, "unit": max(units.values()) * itemsize}


def _largest(axis: Axis, values: dict[str, Any]) -> dict[str, Any]:
    """Each value of the rank where it is largest. Collective."""
    found = axis.allreduce(np.array(list(values.values()), np.float64), "max")
    return dict(zip(values, found.tolist(), strict=True))


def times(mesh: Mesh, size: Size, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step by way, and by those of stage 0: medians within rounds. Collective.

    Each way takes turns with stage 0 while no other one is in memory. Beside the stages: every rank
    "alone" with as many samples, at the same time (stage 0 beside it is weak scaling), the naive
    form of stage 3, and deterministic mode, in which two microbatches are computed like in the line
    before it. None where ranks share cores. `size.batch`: of a rank.
    """
    if zero_limits.cores(mesh) < mesh.size:
        return []
    batch = batch_of(replace(size, batch=size.batch * mesh.size))
    own = batch_of(size)
    ordered, half = Mesh(deterministic=True), max(size.batch // 2, 1)
    ways: dict[str, dict[str, Any]] = {f"stage {n}": {"zero": n} for n in STAGES[1:]}
    if mesh.size > 1:
        ways["stage 3, layers"] = {"zero": 3, "zero_split": "layers"}
    ways |= {
        "deterministic": {"mesh": ordered},
        "2 microbatches": {"microbatch": half},
        "2 microbatches, deterministic": {"mesh": ordered, "microbatch": half},
        "alone": {"mesh": Mesh(Alone())},
    }
    plain = partial(our_step(size, mesh=mesh), batch)
    seconds, ratios, of_plain = dict[str, float](), dict[str, float](), list[Any]()
    for way, options in ways.items():
        step = our_step(size, **{"mesh": mesh} | options)
        call: Call = partial(step, own if way == "alone" else batch)
        found = alternate(mesh.world, {"stage 0": plain, way: call}, rounds)
        seconds[way] = float(np.median(found[way]))
        ratios[way] = float(np.median(found[way] / found["stage 0"]))
        of_plain.append(found["stage 0"])
        del step, call
        gc.collect()
    seconds = {"stage 0": float(np.median(np.concatenate(of_plain))), **seconds}
    return [
        {
            "ranks": mesh.size, "way": way, "block": size.block, "batch": size.batch,
            "seconds": once, "ratio": ratios.get(way, 1.0),
        }
        for way, once in seconds.items()
    ]  # fmt: skip
