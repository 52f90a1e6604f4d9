"""The report of `hpcml bench zero` as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def table(report: Row) -> str:
    """All parts that were measured, each with a heading that says what its columns are."""
    parts = [SECTIONS[part](report) for part in SECTIONS if report.get(part)]
    return "\n\n".join([f"ZeRO, AdamW, {report['cpu']}", *parts])


def _states(report: Row) -> str:
    from hpcml.bench.zero import moved

    rows = report["states"]
    memory = [["ranks", "stage", "type", "form", "params", "grads", "optim", "sum", "formula",
               "above", "bucket + 2 units"]]  # fmt: skip
    traffic = [["ranks", "stage", "form", "microbatches", "moved", "formula", "all-reduce",
                "reduce-scatter", "all-gather", "reduce", "broadcast", "sent"]]  # fmt: skip
    for row in rows:
        held, about = row["states"], [str(row["ranks"]), str(row["stage"])]
        if row["microbatches"] == 1:
            beside = row["bucket"] + 2 * row["unit"]
            memory.append([
                *about, row["precision"], row["split"],
                *(f"{held[kind]:.2f}" for kind in ("params", "grads", "optim")),
                f"{sum(held.values()):.2f}", f"{sum(row['formula'].values()):.2f}",
                _mib(row["buffers"]), _mib(beside),
            ])  # fmt: skip
        if row["precision"] == "fp32" and row["ranks"] > 1:
            operations = ("all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast")
            counts = [row["payload"].get(operation, 0.0) for operation in operations]
            traffic.append([
                *about, row["split"], str(row["microbatches"]), f"{moved(row):.2f}",
                str(row["payload_formula"]), *(f"{n:.2f}" if n >= 0.005 else "" for n in counts),
                f"{row['sent']:.2f}",
            ])  # fmt: skip
    text = (
        f"GPT of {report['layers']} layers, width {report['width']}: "
        f"{rows[0]['params'] / 1e6:.1f} million parameters. Bytes a parameter on the rank that "
        f"holds most; above: MiB of buffers at the peak of a step\n{columns(memory)}"
    )
    if len(traffic) > 1:
        text += (
            "\n\nElements a parameter in a step: moved counts an all-reduce twice; sent: by the "
            f"rank that sent most\n{columns(traffic)}"
        )
    return text


def _time(report: Row) -> str:
    rows = report["time"]
    lines = [["ranks", "", "ms", "times stage 0"]]
    lines += [
        [
            str(row["ranks"]),
            row["way"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['ratio']:.3f}",
        ]
        for row in rows
    ]
    title = (
        f"A step of the GPT of {report['layers']} layers, width {report['width']}, with "
        f"{rows[0]['batch']} x {rows[0]['block']} tokens a rank, one thread each, fp32"
    )
    return f"{title}\n{columns(lines)}"


def _models(report: Row) -> str:
    rows = report["models"]
    lines = [["ranks", "stage", "layers", "parameters", "formula", "of it"]]
    lines += [
        [str(row["ranks"]), str(row["stage"]), str(row["layers"]), f"{row['params'] / 1e6:.2f} M",
         f"{row['formula'] / 1e6:.2f} M", f"{row['params'] / row['formula']:.0%}"]
        for row in rows
    ]  # fmt: skip
    title = (
        f"The largest GPT of width {rows[0]['width']} that trains with "
        f"{rows[0]['budget'] / 1e6:g} MB a rank, {rows[0]['precision']}; formula: the states alone"
    )
    return f"{title}\n{columns(lines)}"


def _batches(report: Row) -> str:
    rows = report["batches"]
    lines = [["ranks", "stage", "microbatch", "samples/s", "on one rank", "samples/s", "gain"]]
    for row in rows:
        fast, slow = row["samples_per_second"], row["alone_samples_per_second"]
        gain = f"{fast / slow:.2f}" if slow else "-"
        lines.append([str(row["ranks"]), str(row["stage"]), str(row["microbatch"]), f"{fast:.1f}",
                      str(row["alone"]), f"{slow:.1f}", gain])  # fmt: skip
    title = (
        f"The largest microbatch that {rows[0]['budget'] / 1e6:g} MB a rank hold, and samples a "
        f"second of a rank with it,\nbeside those with the microbatch that one rank could hold; "
        f"all ranks on {rows[0]['cores']} cores"
    )
    return f"{title}\n{columns(lines)}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / (1 << 20):.2f}"


SECTIONS: dict[str, Callable[[Row], str]] = {
    "states": _states, "time": _time, "models": _models, "batches": _batches,
}  # fmt: skip
