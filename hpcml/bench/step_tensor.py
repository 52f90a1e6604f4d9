"""One model and one batch divided among ranks in every way: time, traffic and memory of a step.

Strong scaling: the ranks share the batch of the size. Beside data parallelism stand tensor
parallelism (Shoeybi et al. 2019), the way that it improves on (`tensor.split="naive"`), sequence
parallelism, with parts of activations kept too, and context parallelism.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.bench.rounds import Call, alternate, ratio
from hpcml.bench.step import SIZES, Row, Size, batch_of, begin, our_step, rest_for, rounds_for
from hpcml.comm import Mesh
from hpcml.comm.grid import AXES
from hpcml.comm.guard import agree
from hpcml.parallel import Step

SP: dict[str, Any] = {"sequence_parallel": True}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp": ("dp", {}),
    "tp": ("tp", {}),
    "tp, naive": ("tp", {"tensor_split": "naive"}),
    "tp, sequence": ("tp", SP),
    "tp, sequence, parts": ("tp", {**SP, "partition_activations": "yes"}),
    "cp": ("cp", {}),
}
"""A layout's axis, and options of `parallelize`."""


def run(mesh: Mesh, sizes: Sequence[str], threads: int = 1, rounds: int = 0) -> dict[str, Any]:
    """Measure among all ranks of the job; the report as plain values. Collective."""
    report = agree(mesh.world, partial(begin, "tensor", "", threads, mesh.size))
    rows = [row for name in sizes for row in _size(mesh, SIZES[name], threads, rounds)]
    return report | {"rows": rows}


def _size(mesh: Mesh, size: Size, threads: int, rounds: int) -> list[Row]:
    batch = batch_of(size)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, (axis, options) in WAYS.items():
        rows[name] = {"size": str(size), "layout": name}
        if axis == "tp" and size.heads % mesh.size:
            rows[name]["cannot_run"] = f"{size.heads} heads on {mesh.size} ranks"
            continue
        gc.collect()
        before = memory.account().total
        step = our_step(size, mesh=Mesh({**dict.fromkeys(AXES, 1), axis: mesh.size}), **options)
        rows[name] |= _accounts(mesh, step, batch, before)
        calls[name] = partial(step, batch)
    times = alternate(mesh.world, calls, rounds or rounds_for(size), rest_for(threads))
    for name, seconds in times.items():
        rows[name] |= {"ours": float(np.median(seconds)), "ratio": ratio(times, name, "dp")}
    return list(rows.values())


def _accounts(mesh: Mesh, step: Step, batch: Any, before: int) -> Row:
    """What a step sends, the most of any rank, and holds beyond what was there."""
    step(batch)
    account, ledger = memory.account(), step.mesh.ledger
    account.reset_peak()
    sent = ledger.snapshot()
    step(batch)
    counts = [c for axis in (ledger.snapshot() - sent).values() for c in axis.values()]
    mine = np.array([sum(c.calls for c in counts), sum(c.bytes_sent for c in counts),
                     account.peak["activations"], account.total - before])  # fmt: skip
    calls, nbytes, activations, held = mesh.world.allreduce(mine, "max").tolist()
    return {"calls": calls, "sent": nbytes, "activations": activations, "held": held}
