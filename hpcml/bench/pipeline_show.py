"""The report of `hpcml bench pipeline` for people: tables, and the schedules as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from hpcml.bench.zero_show import columns
from hpcml.trace.picture import beside, draw
from hpcml.trace.theory import Theory

Row = dict[str, Any]


def table(report: Row) -> str:
    """A block for each size, a row for each schedule; below, the stage times."""
    peer, blocks = report["peer"], []
    for size, found in groupby(report["rows"], lambda row: row["size"]):
        rows = list(found)
        lines = [["", "hpcml ms", *([f"{peer} ms", "ratio", "difference of losses"] * bool(peer)),
                  "formula", "simulated", "measured", "of simulated", "kept", "MiB"]]  # fmt: skip
        for row in rows:
            cells = [row["schedule"], _ms(row["ours"])]
            if peer:
                there = "peer" in row
                cells += [_ms(row["peer"]), f"{row['ratio']:.2f}"] if there else ["-", "-"]
                cells.append(f"{row['loss_difference']:.1e}" if there else "-")
            cells.append("-" if row["formula"] is None else f"{row['formula']:.1%}")
            cells += [f"{row['simulated']:.1%}", f"{row['bubble']:.1%}"]
            cells += [f"{row['of_simulated']:.3f}", " ".join(map(str, row["kept"]))]
            cells.append(" ".join(f"{nbytes / (1 << 20):.0f}" for nbytes in row["activations"]))
            lines.append(cells)
        blocks += ["", f"{size}: layers, width, block, batch", columns(lines), ""]
        blocks += [f"{row['schedule']}: {_times(row)}" for row in rows]
        blocks += [f"{row['schedule']}: {row['beside']} cannot run: {row['cannot_run']}"
                   for row in rows if "cannot_run" in row]  # fmt: skip
    return "\n".join([_title(report), *blocks])


def _title(report: Row) -> str:
    peer = report["peer"]
    beside = f"; beside {peer} {report['packages'][peer]}" if peer else ""
    return (
        f"training step in a pipeline of {report['ranks']} ranks of {report['threads']} "
        f"thread{'s'[: report['threads'] > 1]}, {report['microbatches']} microbatches, fp32, "
        f"{report['cpu']}{beside}\nGEMM by {report['gemm']}. Bubble: share of the time of all "
        "ranks, by formula, simulated with the stage times, measured; of simulated: the makespan; "
        "kept: microbatches' activations at most, by rank, and their memory"
    )


def _times(row: Row) -> str:
    stages = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in row["stages"].items())
    whole = f"{_ms(row['makespan'])} ms of pipeline{_batches(row)}"
    return f"{whole}; {stages}, message {_ms(row['message'])}"


def _batches(row: Row) -> str:
    return f", {row['batches']} batches" if row["batches"] > 1 else ""


def plot(report: Row, drawn: Sequence[Theory], path: str) -> None:
    """Draw a recorded step of each row beside its theory, all over one time."""
    longest = max(max(one.makespan, one.simulation.makespan) for one in drawn)
    panels = [
        panel
        for row, one in zip(report["rows"], drawn, strict=True)
        for panel in beside(one, f"{row['schedule']}{_batches(row)}", longest)
    ]
    draw(panels, path, columns=2)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
