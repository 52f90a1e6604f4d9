"""A GPT training step in a pipeline, schedule by schedule: bubble measured, simulated, by formula.

All ranks of the job are one pipeline. The schedules take turns, each beside the one of the same
name in `torch.distributed.pipelining` where there is one, cut alike, from the same weights on the
same batch. Then some steps of each are recorded: what the ranks did, beside the simulator's opinion
on the same actions with the stage times of the same step (`hpcml.trace.theory`).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.bench.rounds import Call, alternate, ratio
from hpcml.bench.step import (
    CHECKED,
    SIZES,
    VOCAB,
    Row,
    Size,
    batch_of,
    begin,
    largest,
    our_step,
    rest_for,
    rounds_for,
    tried,
    weights_of,
)
from hpcml.comm import Mesh
from hpcml.comm.grid import AXES
from hpcml.comm.guard import agree
from hpcml.errors import UserError
from hpcml.parallel.pipeline import Kind, find
from hpcml.parallel.pipeline.actions import COMPUTE
from hpcml.parallel.pipeline.step import PipelineStep
from hpcml.trace.record import Recorder
from hpcml.trace.theory import Theory, theory

CHUNKS = 2
"""Stages of a rank where it has several."""
_RECORDED = 5
"""Steps of each schedule of which timelines are kept."""
_BATCHES = 2
"""Batches of a recorded step of a pipeline that is not emptied after each: it fills and drains."""


def run(
    mesh: Mesh, sizes: Sequence[str], schedules: Sequence[str], microbatches: int,
    peer: str = "", threads: int = 1, rounds: int = 0,
) -> tuple[dict[str, Any], list[Theory]]:  # fmt: skip
    """Measure among all ranks of the job; the report as plain values, and what to draw. Collective.

    What to draw: a recorded step of every row, that of the median makespan. The other arguments are
    those of `hpcml.bench.step.run`.
    """
    report = agree(mesh.world, partial(begin, "time", peer, threads, mesh.size))
    gloo = _gloo(mesh, threads) if peer else None
    rows, drawn = [], []
    for name in sizes:
        size = SIZES[name]
        size = replace(size, batch=-(-size.batch // microbatches) * microbatches)
        for row, step in measure(mesh, size, schedules, microbatches, peer, threads, rounds):
            rows.append(row)
            drawn.append(step)
    if gloo:
        gloo.close()
    about = {"bench": "pipeline", "version": 1, "microbatches": microbatches}
    return report | about | {"rows": rows}, drawn


def _gloo(mesh: Mesh, threads: int) -> Any:
    from hpcml.bench.gloo_peer import GlooPeer

    return GlooPeer(mesh, threads)


def measure(
    mesh: Mesh, size: Size, schedules: Sequence[str], microbatches: int, peer: str, threads: int,
    rounds: int,
) -> list[tuple[Row, Theory]]:  # fmt: skip
    """One size: a row for each schedule, and a recorded step of it."""
    line = Mesh({**dict.fromkeys(AXES, 1), "pp": mesh.size})
    batch = batch_of(size)
    steps = {name: _step(line, size, name, microbatches) for name in schedules}
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    for name, step in steps.items():
        row: Row = {"size": str(size), "schedule": name}
        calls[name] = partial(step, batch)
        if peer and step.grad_clip > 0:
            row |= _beside(line, size, step, batch, microbatches, calls)
        rows.append(row)
    times = alternate(line.world, calls, rounds or rounds_for(size), rest_for(threads))
    recorder = Recorder(line)
    found = []
    for row in rows:
        name = row["schedule"]
        row["ours"] = float(np.median(times[name]))
        if _peer(name) in times:
            row["peer"] = float(np.median(times[_peer(name)]))
            row["ratio"] = ratio(times, name, _peer(name))
        row["formula"] = formula(name, mesh.size, microbatches)
        row["activations"] = _activations(line, steps[name], batch)
        found.append((row, _record(recorder, line, steps[name], batch, row)))
    calls.clear()
    gc.collect()  # what PyTorch lays out over ranks must be gone before its process group ends
    return found


def _step(mesh: Mesh, size: Size, schedule: str, microbatches: int) -> PipelineStep:
    """A step by a schedule, which may refuse clipping and weights that stages share."""
    synchronous = find(schedule, mesh.size, microbatches).synchronous
    alike: dict[str, Any] = {} if synchronous else {"grad_clip": 0.0, "tie_embeddings": False}
    chunks = CHUNKS if schedule == "interleaved" else 1
    step = our_step(
        size, mesh=mesh, schedule=schedule, chunks=chunks, microbatch=size.batch // microbatches,
        **alike,
    )  # fmt: skip
    assert isinstance(step, PipelineStep)
    return step


def _beside(
    mesh: Mesh, size: Size, step: PipelineStep, batch: Any, microbatches: int,
    calls: dict[str, Call],
) -> Row:  # fmt: skip
    """Add the peer's counterpart to what is called; how far its losses are from ours."""
    from hpcml.bench import torch_pipeline

    kind = torch_pipeline.SCHEDULES.get(step.schedule)
    if kind is None:
        return {}
    weights, stages = weights_of(step), _stages(mesh, step)
    make = partial(
        torch_pipeline.step, step.schedule, size, weights, batch, VOCAB, stages, microbatches
    )
    try:
        calls[_peer(step.schedule)], losses = agree(mesh.world, partial(tried, make))
    except UserError as error:
        return {"beside": kind.__name__, "cannot_run": str(error)}
    ours = [step(batch) for _ in range(CHECKED)]
    return {"beside": kind.__name__, "loss_difference": largest(losses, ours)}


def _peer(schedule: str) -> str:
    return f"peer {schedule}"


def _stages(mesh: Mesh, step: PipelineStep) -> list[list[str]]:
    """The links of each stage, by name. Collective."""
    mine = {n: [link.name for link in stage.links] for n, stage in step.assembly.stages.items()}
    every = {n: names for one in mesh.world.allgather_object(mine) for n, names in one.items()}
    return [every[number] for number in sorted(every)]


def _activations(mesh: Mesh, step: PipelineStep, batch: Any) -> list[int]:
    """Bytes of activations at the peak of a step, by rank. Collective."""
    gc.collect()
    account = memory.account()
    account.reset_peak()
    step(batch)
    return mesh.world.allgather_object(account.peak["activations"])


def _record(recorder: Recorder, mesh: Mesh, step: PipelineStep, batch: Any, row: Row) -> Theory:
    """Record steps and add to the row what they are like; that of the median makespan."""
    batches = 1 if step.grad_clip > 0 else _BATCHES

    def whole() -> None:
        for _ in range(batches):
            step(batch)
        step.settle()

    step.settle()
    found = []
    for _ in range(_RECORDED):
        mesh.world.barrier()
        _, own = recorder.record(whole)
        found.append(theory(mesh.world.allgather_object(own)))
    found.sort(key=lambda one: one.makespan)
    middle = found[_RECORDED // 2]
    simulation = middle.simulation
    row |= {
        "batches": batches,
        "makespan": middle.makespan,
        "of_simulated": median(one.ratio for one in found),
        "bubble": median(one.bubble for one in found),
        "simulated": median(one.simulation.bubble for one in found),
        "kept": list(simulation.peaks),
        "message": middle.costs.kinds[Kind.SEND_F],
        "stages": {
            f"{stage}{kind}": seconds
            for (stage, kind), seconds in sorted(middle.costs.stages.items())
            if kind in COMPUTE
        },
    }
    return middle


def formula(schedule: str, ranks: int, microbatches: int) -> float | None:
    """The bubble of a schedule with equal stages, as a share of the time; None of those without.

    Huang et al. 2018 for gpipe and 1f1b; Narayanan et al. 2021, section 2.2, for interleaved; Qi et
    al. 2023, table 2, for zero-bubble (ZB-H1) where forward and both halves of backward take as
    long as each other.
    """
    others, total = ranks - 1, microbatches
    of_ideal = {
        "naive": others * total,
        "gpipe": others,
        "1f1b": others,
        "interleaved": others / CHUNKS,
        "zero-bubble": others / 3,
    }
    if schedule not in of_ideal:
        return None
    return of_ideal[schedule] / (of_ideal[schedule] + total)
