"""One job of the benchmark of scaling: so many ranks, so many threads each."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.autograd import Tensor
from hpcml.bench.rounds import alternate
from hpcml.bench.scaling import KINDS, of_kind
from hpcml.bench.step import Size, batch_of, our_step
from hpcml.comm import Mesh
from hpcml.parallel import Step

Report = dict[str, Any]


def run(mesh: Mesh, size: Size) -> Report:
    """Time the step in both kinds of scaling, which for one rank are the same. Collective."""
    kinds = KINDS[:1] if mesh.size == 1 else KINDS
    found = {kind: measure(mesh, of_kind(size, kind, mesh.size)) for kind in kinds}
    return {kind: found.get(kind, found[KINDS[0]]) for kind in KINDS}


def gemm(mesh: Mesh, sizes: Sequence[int]) -> Report:
    """FLOP/s of each rank in the best of NumPy's float32 products, all ranks at once. Collective.

    sizes: rows and columns of the matrices.
    """
    best = 0.0
    for n in sizes:
        a, b, out = (np.full((n, n), 1e-3, np.float32) for _ in range(3))
        times = alternate(mesh.world, {"": partial(np.matmul, a, b, out=out)}, rounds=5)
        best = max(best, 2 * n**3 / float(times[""].min()))
    return {"gemm": mesh.world.allgather_object(best)}


def measure(mesh: Mesh, size: Size) -> Report:
    """A step with a batch of all ranks: its time, and compute and peak memory by rank.

    seconds: median over steps of the slowest rank. compute: median seconds of forward and backward.
    memory: bytes, the peak of a step.
    """
    gc.collect()
    step, batch = our_step(size, mesh=mesh), batch_of(size)
    step(batch)
    memory.account().reset_peak()
    with clocked(step) as compute:
        times = alternate(mesh.world, {"": partial(step, batch)})
    own = (median(compute), memory.account().peak_total)
    every = mesh.world.allgather_object(own)
    return {
        "seconds": median(times[""].tolist()),
        "compute": [seconds for seconds, _ in every],
        "memory": [peak for _, peak in every],
    }


@contextmanager
def clocked(step: Step) -> Iterator[list[float]]:
    """Inside, the seconds of every forward and backward of this rank go into the list."""
    zero, seconds = step.zero, []
    begin, end = zero.before_backward, zero.after_backward

    def before(coming: Iterable[Tensor | None], **how: Any) -> None:
        begin(coming, **how)
        seconds.append(-time.perf_counter())

    def after() -> None:
        seconds[-1] += time.perf_counter()
        end()

    zero.before_backward, zero.after_backward = before, after  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        del zero.before_backward, zero.after_backward
