"""What fits into a budget of memory, found by running a step under a limit, and what that gives.

Two questions of the ZeRO paper in miniature. Its Table 2: how large may a model be? And how its
training got faster by more than the number of GPUs (section 10.3): with the states divided among
more ranks there is room for larger microbatches, which compute faster.

Whether something fits is tried by ranks that are threads (`hpcml.run`): each has an account of its
own, and a refusal ends a trial instead of the job.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import hpcml
from hpcml import backend, memory
from hpcml.bench.rounds import Call, alternate
from hpcml.bench.step import VOCAB, Size, batch_of, our_step
from hpcml.comm import Mesh
from hpcml.errors import MemoryLimitError
from hpcml.parallel.states import STAGES, model_states

PRECISION = "bf16"
MODEL = Size(layers=0, heads=1, width=64, block=4, batch=1)
"""Of the part "models": what is asked is the number of layers."""
MODEL_BUDGET = 6_000_000
BATCHED = Size(layers=4, heads=4, width=128, block=32, batch=0)
"""Of the part "batches": what is asked is the batch of a rank."""
BATCH_BUDGET = 16_000_000
BATCH_STAGES = (2, 3)
_MOST = 1 << 10
_PATIENCE = 60


def cores(mesh: Mesh) -> int:
    """How many cores the ranks of the job have together. Collective."""
    every = mesh.world.allgather_object((mesh.node.index, backend.cores()))
    return len({(node, core) for node, mine in every for core in mine})


def models(mesh: Mesh) -> list[dict[str, Any]]:
    """The largest GPT by stage, in parameters, beside what the states alone allow. Collective."""
    rows = []
    layer, rest = _params(1) - _params(0), _params(0)
    for stage in STAGES:
        bound = MODEL_BUDGET / sum(model_states(stage, mesh.size, PRECISION).values())
        layers = _most_layers(mesh, stage, int((bound - rest) // layer))
        rows.append({
            "ranks": mesh.size, "stage": stage, "precision": PRECISION, "budget": MODEL_BUDGET,
            "layers": layers, "width": MODEL.width, "params": _params(layers) if layers else 0,
            "formula": bound,
        })  # fmt: skip
    return rows


def _most_layers(mesh: Mesh, stage: int, bound: int) -> int:
    def good(layers: int) -> bool:
        size = replace(MODEL, layers=layers)
        return fits(size, stage, PRECISION, MODEL_BUDGET, mesh.size)

    return _largest(mesh, good, bound)


def _params(layers: int) -> int:
    """Parameters of the GPT with so many layers."""
    width = MODEL.width
    return layers * (12 * width**2 + 2 * width) + (VOCAB + MODEL.block + 1) * width


def batches(mesh: Mesh, rounds: int) -> list[dict[str, Any]]:
    """The largest microbatch by stage, and samples a second of a rank with it. Collective.

    Beside it, timed in turns, the microbatch for which there would be room on one rank.
    """
    rows = []
    for stage in BATCH_STAGES:
        sizes = [_largest_batch(mesh, stage, ranks) for ranks in (mesh.size, 1)]
        speeds = _speeds(mesh, stage, sizes, rounds)
        rows.append({
            "ranks": mesh.size, "stage": stage, "budget": BATCH_BUDGET, "cores": cores(mesh),
            "microbatch": sizes[0], "samples_per_second": speeds[0],
            "alone": sizes[1], "alone_samples_per_second": speeds[1],
        })  # fmt: skip
    return rows


def _largest_batch(mesh: Mesh, stage: int, ranks: int) -> int:
    def good(batch: int) -> bool:
        return fits(replace(BATCHED, batch=batch), stage, "fp32", BATCH_BUDGET, ranks)

    return _largest(mesh, good, _MOST)


def _speeds(mesh: Mesh, stage: int, sizes: Sequence[int], rounds: int) -> list[float]:
    """Samples a second of a rank, by the samples that it computes at once; 0 for 0."""
    calls: dict[str, Call] = {}
    for batch in filter(None, sizes):
        step = our_step(BATCHED, mesh=mesh, zero=stage)
        fields = batch_of(replace(BATCHED, batch=batch * mesh.size))
        calls[str(batch)] = partial(step, fields)
    found = alternate(mesh.world, calls, rounds) if calls else {}
    gc.collect()
    return [batch / float(np.median(found[str(batch)])) if batch else 0.0 for batch in sizes]


def fits(size: Size, stage: int, precision: str, budget: int, ranks: int) -> bool:
    """Whether so many ranks can train with `budget` bytes each, `size.batch` samples a rank."""
    fields = batch_of(replace(size, batch=size.batch * ranks))

    def train() -> None:
        memory.set_limit(budget)
        step = our_step(size, precision, zero=stage)
        for _ in range(3):  # from the third on there are places, and units are fetched ahead
            step(fields)

    try:
        hpcml.run(train, ranks=ranks, timeout=_PATIENCE)
    except MemoryLimitError:  # of some rank: it ends those that would wait for it
        return False
    finally:
        gc.collect()
    return True


def _largest(mesh: Mesh, good: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `good` holds; 0 if there is none. Collective.

    The first rank tries. Small numbers come first: trials of large ones take long.
    """

    def agreed(number: int) -> bool:
        return mesh.world.broadcast_object(good(number) if mesh.rank == 0 else False)

    low, high = 0, 1
    while high <= most and agreed(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if agreed(middle) else (low, middle)
    return low
