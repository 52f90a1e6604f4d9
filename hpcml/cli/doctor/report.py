"""The doctor's report: rows, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "absent"]


@dataclass(frozen=True)
class Row:
    """One finding. "fail" is kept for what nothing works without; "absent" for what may be missing.

    `remedy` says what to do about it, if there is anything.
    """

    name: str
    status: Status
    value: str
    remedy: str = ""


def as_json(rows: Sequence[Row], calls: Sequence[Mapping[str, str]]) -> str:
    """Return the report as one JSON object: `ok`, `checks`, a list of the rows, and `calls`.

    calls: how every kind of call of the communication went.
    """
    checks = [asdict(row) for row in rows]
    return json.dumps({"ok": healthy(rows), "checks": checks, "calls": list(calls)}, indent=2)


def healthy(rows: Sequence[Row]) -> bool:
    """Whether nothing essential failed."""
    return all(row.status != "fail" for row in rows)


def as_text(rows: Sequence[Row]) -> str:
    """Return the report as lines of plain text."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.status:<6}  {row.name:<{width}}  {row.value}")
        if row.remedy:
            lines.append(f"{'':<6}  {'':<{width}}  -> {row.remedy}")
    return "\n".join(lines)


def show(rows: Sequence[Row]) -> None:
    """Print the report as a coloured table, for a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "dim"}
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    for row in rows:
        remedy = f"\n[bold]→ {escape(row.remedy)}[/]" if row.remedy else ""
        colour = colours[row.status]
        table.add_row(f"[{colour}]{row.status}[/]", row.name, escape(row.value) + remedy)
    Console().print(table)
