"""What each rank holds and sends: `memory` and `comm` of the metrics, and the table at the end."""

from __future__ import annotations

from typing import Any

from hpcml import memory
from hpcml.account import table
from hpcml.comm import Axis
from hpcml.parallel.states import model_states

Record = dict[str, dict[str, float]]

_AT_PEAK = {"activations_peak": "activations (peak)", "buffers": "buffers (peak)",
            "total_peak": "total (peak)"}  # fmt: skip


def memory_record(axis: Axis) -> Record:
    """Bytes by category over the ranks of `axis`: min, mean, max, and the rank of the max."""
    mine = own_memory()
    every = axis.allgather_object(mine)
    return {name: _spread([rank[name] for rank in every]) for name in mine}


def own_memory() -> dict[str, int]:
    """This rank's bytes: model states and total as they are, the others at their peak."""
    account = memory.account()
    live = {name: account.live[name] for name in ("params", "grads", "optim")}
    return {**live, "activations_peak": account.peak["activations"],
            "buffers": account.peak["buffers"], "total": account.total,
            "total_peak": account.peak_total}  # fmt: skip


def memory_table(
    record: Record, *, params: int, trainable: int, stage: int, ranks: int, precision: str,
    states: int,
) -> str:  # fmt: skip
    """Return "where did all the memory go" for people: the record of a run beside the formula.

    record: from `memory_record`; the rank with most counts. params, trainable: number of
    parameters, and of those that get gradients. The others are as for
    `hpcml.parallel.states.model_states`; activations and buffers have no formula there.
    """
    formula = model_states(stage, ranks, precision, states)
    columns = ("bytes", "per parameter", "formula", "difference", "rank")
    rows = {}
    for name, entry in record.items():
        most = entry["max"]
        expected = formula.get(name, 0.0) * (params if name == "params" else trainable)
        rows[_AT_PEAK.get(name, name)] = (
            f"{most:,.0f}",
            f"{most / params:.2f}",
            f"{expected / params:.2f}" if expected else "",
            f"{100 * (most / expected - 1):+.1f} %" if expected else "",
            f"{entry['max_rank']:.0f}",
        )
    beside = f"{precision}, {states} state(s) of the optimizer, zero.stage={stage}, {ranks} rank(s)"
    return f"{table(rows, columns)}\n  formula: {beside}"


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
