"""The `memory` and `comm` records of the metrics: what each rank holds and sends."""

from __future__ import annotations

from typing import Any

from hpcml import memory
from hpcml.comm import Axis


def memory_record(axis: Axis) -> dict[str, dict[str, float]]:
    """Bytes by category over the ranks of `axis`: min, mean, max, and the rank of the max."""
    mine = own_memory()
    every = axis.allgather_object(mine)
    return {name: _spread([rank[name] for rank in every]) for name in mine}


def own_memory() -> dict[str, int]:
    """This rank's bytes: live by category, activations at their peak."""
    account = memory.account()
    live = {name: account.live[name] for name in ("params", "grads", "optim")}
    return {**live, "activations_peak": account.peak["activations"],
            "buffers": account.peak["buffers"]}  # fmt: skip


def _spread(values: list[int]) -> dict[str, float]:
    most = max(values)
    return {"min": min(values), "mean": sum(values) / len(values), "max": most,
            "max_rank": values.index(most)}  # fmt: skip


def comm_record(axis: Axis, mine: dict[str, Any]) -> dict[str, Any]:
    """Calls and bytes of one step by mesh axis and operation, the largest of any rank."""
    largest: dict[str, Any] = {}
    for rank in axis.allgather_object(mine):
        for name, operations in rank.items():
            for operation, counts in operations.items():
                entry = largest.setdefault(name, {}).setdefault(operation, dict(counts))
                for what, value in counts.items():
                    entry[what] = max(entry[what], value)
    return largest
