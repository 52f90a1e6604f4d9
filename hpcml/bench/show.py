"""Reports of the collectives for people: tables for the terminal and a picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

from hpcml import pictures

Row = dict[str, Any]

CHOSEN = ("MPI", "auto", "window")
"""Contenders whose bandwidths are shown."""
SHARE = "share of the memory's bandwidth"
LEFT: dict[str, Any] = {"title_justify": "left", "box": None}


def tables(report: dict[str, Any]) -> None:
    """Print a table for each operation: how many times as fast as MPI each contender is.

    Below, for MPI, what is chosen and memory from `Axis.empty`: time, bandwidths, and the share of
    the memory's bandwidth.
    """
    from rich.console import Console
    from rich.table import Table

    width = max(120, shutil.get_terminal_size((120, 24)).columns)
    console = Console(width=width, highlight=False)
    console.print(heading(report))
    for operation in _unique(row["operation"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["operation"] == operation]
        names = _unique(row["algorithm"] for row in rows)
        sizes = _unique(row["bytes"] for row in rows)
        cells = {(row["algorithm"], row["bytes"]): row for row in rows}
        times = Table(title=f"\n{operation}: times as fast as MPI", **LEFT)
        times.add_column("size", justify="right")
        times.add_column("MPI", justify="right")
        for name in names[1:]:
            times.add_column(name, justify="right")
        for size in sizes:
            ratios = [_number(_get(cells, name, size, "ratio")) for name in names[1:]]
            times.add_row(human(size), seconds(cells["MPI", size]["seconds"]), *ratios)
        mean = {m["algorithm"]: m["ratio"] for m in report["means"] if m["operation"] == operation}
        if any(mean.values()):
            times.add_row("mean from 64 KiB", "", *(_number(mean[name]) for name in names[1:]))
        console.print(times)
        console.print(_bandwidths(cells, [name for name in names if name in CHOSEN]))


def heading(report: dict[str, Any]) -> str:
    """What was measured where, in a line or two."""
    memory = ", ".join(f"{kind} {gb(rate)}" for kind, rate in report["memory_bandwidth"].items())
    return (
        f"{report['ranks']} ranks on {report['nodes']} node(s), {report['dtype']}, "
        f"{report['mpi']}, {report['cpu']}\nmemory of a node with all its ranks: {memory} GB/s"
    )


def _bandwidths(cells: dict[tuple[str, int], Row], names: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=f"times; algorithm and bus bandwidth in GB/s; {SHARE}", **LEFT)
    table.add_column("size", justify="right", no_wrap=True)
    for name in names:
        for head in (f"{name}\ntime", "\nalg", "\nbus", "\nmemory"):
            table.add_column(head, justify="right", no_wrap=True)
    for size in _unique(size for _, size in cells):
        line = [human(size)]
        for name in names:
            row = cells.get((name, size))
            if row is None:
                line += ["-"] * 4
                continue
            share = row["memory_share"]
            line += [seconds(row["seconds"]), gb(row["algbw"]), gb(row["busbw"])]
            line.append("-" if share is None else f"{share:.0%}")
        table.add_row(*line)
    return table


def plot(report: dict[str, Any], path: str) -> None:
    """Draw time and bus bandwidth by size, a column for each operation."""
    plt = pictures.pyplot()
    operations = _unique(row["operation"] for row in report["rows"])
    size = (4 * len(operations) + 2, 7)
    figure, axes = plt.subplots(2, len(operations), figsize=size, squeeze=False, layout="tight")
    for column, operation in enumerate(operations):
        rows = [row for row in report["rows"] if row["operation"] == operation]
        for name in _unique(row["algorithm"] for row in rows):
            mine = [row for row in rows if row["algorithm"] == name]
            style = "o-" if name in CHOSEN else ".:"
            for place, scale, key in ((axes[0], 1e6, "seconds"), (axes[1], 1e-9, "busbw")):
                places = [row["bytes"] for row in mine]
                values = [row[key] * scale for row in mine]
                place[column].loglog(places, values, style, label=name)
                place[column].set_xscale("log", base=2)
        axes[0, column].set(title=operation, ylabel="µs")
        axes[1, column].set(xlabel="bytes", ylabel="bus bandwidth, GB/s")
        axes[0, column].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def human(nbytes: int) -> str:
    """A size in bytes, as "64 KiB"."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def seconds(value: float) -> str:
    """A time, as "12.3 µs" or "1.23 ms"."""
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def gb(rate: float) -> str:
    """Bytes per second in GB/s."""
    return f"{rate * 1e-9:.2f}"


def _get(cells: dict[tuple[str, int], Row], name: str, size: int, key: str) -> Any:
    return cells.get((name, size), {}).get(key)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
