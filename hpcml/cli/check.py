"""`hpcml check CONFIG.toml [section.key=value ...] [--all] [--json]`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpcml.errors import UserError

if TYPE_CHECKING:
    from hpcml.train.verdict import Layer, Report

_USAGE = "hpcml check CONFIG.toml [section.key=value ...] [--all] [--json]"
_HELP = f"""usage: {_USAGE}

Make a step or two of a run serially and in parallel, side by side, and name the first layer in
which they differ, with the likely cause. Under mpiexec; nothing is written. Keys are those of
`hpcml train`; numbers are fp64 unless train.precision is given here. Every rank holds all of both
runs: make the model as small as it may be. The exit code is 0 if they agree, 1 if not.

  --all   show every module, not only those around the one that matters
  --json  print the report as JSON"""
_AROUND = 6
"""Rows of a long table that are shown before and after the one that matters."""


def run(args: list[str]) -> int:
    """Compare and print; 0 if the runs agree, 1 if not."""
    if "-h" in args or "--help" in args:
        print(_HELP)
        return 0
    from hpcml.comm import guard

    try:
        return _check(args)
    except UserError as error:
        return guard.refuse(error)  # a rank that fails alone takes the others along


def _check(args: list[str]) -> int:
    options = {arg for arg in args if arg.startswith("-")}
    for option in options - {"--all", "--json"}:
        raise UserError(f'unknown option "{option}": {_USAGE}')
    given = [arg for arg in args if arg not in options]
    if not given or "=" in given[0]:
        raise UserError(f"name a configuration: {_USAGE}")
    from hpcml.train import config as configuration
    from hpcml.train.build import begin
    from hpcml.train.check import check

    # Sharp numbers, whatever the run trains with: rounding must not look like a fault, or hide one.
    config = configuration.load(given[0], ["train.precision=fp64", *given[1:]])
    mesh, _ = begin(config)
    report = check(config, mesh)
    if mesh.rank == 0:
        print(_json(report) if "--json" in options else text(report, whole="--all" in options))
    return 0 if report.agrees else 1


def _json(report: Report) -> str:
    return json.dumps({"agrees": report.agrees, **_plain(asdict(report))}, indent=1)


def _plain(value: Any) -> Any:
    """The same with "inf", how far off what is no number is, for which JSON has none."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return "inf" if value == float("inf") else value


def text(report: Report, *, whole: bool = False) -> str:
    """A report as a table for people, and the verdict in its last line."""
    axes = " ".join(f"{name}={size}" for name, size in report.mesh.items()) or "one rank"
    lines = [
        f"serial beside {axes}, {report.precision}, {_steps(report)}: largest differences,",
        f"relative to the largest serial values (tolerance {report.tolerance:g})",
        "",
        *_table(report, whole),
        "",
    ]
    for name, stage in report.others.items():
        shown = "gradient norm" if name == "norm" else name
        lines.append(f"{shown:<14} {_number(stage.off):>8}  {_verdict(stage.agrees)}")
    return "\n".join([*lines, "", _last_line(report)])


def _table(report: Report, whole: bool) -> list[str]:
    layers = report.layers
    head = ["module", "kind", "forward", "backward", "gradients", ""]
    body = [
        [layer.name, layer.kind, *map(_number, (layer.forward, layer.backward, layer.gradient)),
         _verdict(layer.agrees)]
        for layer in layers
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rows = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)),
                   *(cell.rjust(width) for cell, width in zip(row[2:5], widths[2:], strict=False)),
                   row[5]]).rstrip()
        for row in [head, *body]
    ]  # fmt: skip
    if whole or len(layers) <= 3 * _AROUND:
        return rows
    return _around(rows, 1 + _centre(report))


def _centre(report: Report) -> int:
    """The layer that matters most: where the runs part, or where they are farthest apart."""
    layers = report.layers
    names = [layer.name for layer in layers]
    if report.first is not None and report.first.module in names:
        return names.index(report.first.module)
    return max(range(len(layers)), key=lambda i: _off(layers[i]))


def _off(layer: Layer) -> float:
    return max(filter(None, (layer.forward, layer.backward, layer.gradient)), default=0.0)


def _around(rows: list[str], centre: int) -> list[str]:
    low, high = max(centre - _AROUND, 1), min(centre + _AROUND + 1, len(rows))
    before = [f"... {low - 1} more"] if low > 1 else []
    after = [f"... {len(rows) - high} more (--all shows them)"] if high < len(rows) else []
    return [rows[0], *before, *rows[low:high], *after]


def _number(off: float | None) -> str:
    return "-" if off is None else f"{off:.1e}" if off else "0"


def _verdict(ok: bool) -> str:
    return "ok" if ok else "DIFFERS"


def _steps(report: Report) -> str:
    return f"{report.steps} step{'s' * (report.steps > 1)}"


def _last_line(report: Report) -> str:
    if report.first is None:
        return f"agrees: in {_steps(report)} serial and parallel are the same but for rounding"
    first = report.first
    ranks = f"rank{'s' * (len(first.ranks) > 1)} {', '.join(map(str, first.ranks))}"
    within = "" if first.layer == first.module else f", computed in {first.layer}"
    off = f"off by {first.off:.1e} " if first.off else ""
    return (
        f"DIFFERS first in step {first.step}, {first.stage}: {first.what}{within} ({first.kind}), "
        f"{off}on {ranks}: {first.cause}"
    )
