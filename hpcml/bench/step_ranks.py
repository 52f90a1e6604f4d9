"""A GPT training step of several ranks, layout by layout, beside PyTorch's on gloo.

Each rank has the batch of the size: weak scaling. The stages of ZeRO stand beside what PyTorch has
for them, from the same weights on the same batch, in turns within one job, each turn begun together
and as long as the slowest rank takes. `local` and accumulation have no counterpart; what counts is
their time per sample, by that of a plain step of stage 0.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

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
from hpcml.comm.guard import agree
from hpcml.errors import UserError
from hpcml.parallel.states import STAGES

PERIOD = 8
"""Steps of `local` from one average to the next."""
MICROBATCHES = 4
"""Of each rank in a step with accumulation."""


def run(
    mesh: Mesh, sizes: Sequence[str], peer: str = "", threads: int = 1, rounds: int = 0
) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective.

    The arguments are those of `step.run`, threads those of each rank.
    """
    report = agree(mesh.world, partial(begin, "time", peer, threads, mesh.size))
    gloo = _gloo(mesh, threads) if peer else None
    rows: list[Row] = []
    for name in sizes:
        size = SIZES[name]
        count, rest = rounds or rounds_for(size), rest_for(threads)
        rows += [_stage(mesh, size, stage, peer, count, rest) for stage in STAGES]
        rows += _samples(mesh, size, rounds or max(count // 4, 3), rest)
    if gloo:
        gloo.close()
    return report | {"rows": rows}


def _gloo(mesh: Mesh, threads: int) -> Any:
    from hpcml.bench.gloo_peer import GlooPeer

    return GlooPeer(mesh, threads)


def _stage(mesh: Mesh, size: Size, stage: int, peer: str, rounds: int, rest: float) -> Row:
    """A stage of ZeRO beside the peer's counterpart, or why that cannot run."""
    row: Row = {"size": str(size), "layout": f"stage {stage}"}
    step, batch = our_step(size, mesh=mesh, zero=stage), _batch(mesh, size)
    calls: dict[str, Call] = {"ours": partial(step, batch)}
    if peer:
        from hpcml.bench import torch_peer

        row["beside"] = torch_peer.STAGES[stage]
        mine = slice(mesh.rank * size.batch, (mesh.rank + 1) * size.batch)
        own = (batch[0][mine], batch[1][mine])
        make = partial(torch_peer.step_among_ranks, stage, size, weights_of(step), own, VOCAB)
        try:
            calls["peer"], losses = agree(mesh.world, partial(tried, make))
            means = mesh.world.allreduce(np.array(losses)) / mesh.size
            row["loss_difference"] = largest(means.tolist(), [step(batch) for _ in range(CHECKED)])
        except UserError as error:
            row["cannot_run"] = str(error)
    times = alternate(mesh.world, calls, rounds, rest)
    row |= {name: float(np.median(seconds)) for name, seconds in times.items()}
    if "peer" in times:
        row["ratio"] = ratio(times, "ours", "peer")
    # What PyTorch lays out over ranks must be gone before its process group ends.
    del calls
    gc.collect()
    return row


def _samples(mesh: Mesh, size: Size, rounds: int, rest: float) -> list[Row]:
    """What has no counterpart, beside stage 0: seconds for the samples of one step of that.

    A turn of `local` is a whole period, so that each has its share of the average.
    """
    whole = partial(our_step, size, mesh=mesh)
    plain, batch = whole(), _batch(mesh, size)
    local = whole(mode="local", period=PERIOD)
    accumulating = whole(microbatch=size.batch)
    large = _batch(mesh, replace(size, batch=MICROBATCHES * size.batch))

    def period() -> None:
        for _ in range(PERIOD):
            local(batch)

    calls: dict[str, Call] = {
        "stage 0": partial(plain, batch),
        f"local, period {PERIOD}": period,
        f"{MICROBATCHES} microbatches": partial(accumulating, large),
    }
    steps = dict(zip(calls, (1, PERIOD, MICROBATCHES), strict=True))
    times = alternate(mesh.world, calls, rounds, rest)
    times = {name: seconds / steps[name] for name, seconds in times.items()}
    gc.collect()
    return [
        {
            "size": str(size), "layout": name, "ours": float(np.median(times[name])),
            "per_sample": ratio(times, "stage 0", name),
        }
        for name in calls
    ]  # fmt: skip


def _batch(mesh: Mesh, size: Size) -> Any:
    """The batch of all ranks, `size.batch` samples each."""
    return batch_of(replace(size, batch=size.batch * mesh.size))
