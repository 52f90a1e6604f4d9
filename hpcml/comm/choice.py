"""The measured table of algorithms: the one shipped, a user's file, and fitting it to a machine.

A file is TOML: for a place ("node" if all ranks share a node, else "network") and a number of
ranks, rows of (up to bytes, algorithm) for each operation, ascending:

    [node.4]
    allreduce = [[16384, "recursive_doubling"], [inf, "vendor"]]

Bytes are those of the payload as the ledger counts it. Where the table says nothing, or names an
algorithm that cannot serve the call (as most cannot for 16-bit floats and in deterministic mode),
the cost formulas decide: see `choose`.
"""

from __future__ import annotations

import os
import pickle
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hpcml.comm.algorithms.broadcast import binomial
from hpcml.comm.algorithms.choosing import NETWORK, NODE, Table, choose
from hpcml.comm.algorithms.registry import OPERATIONS, algorithms
from hpcml.comm.link import Link
from hpcml.comm.transport import Transport
from hpcml.errors import UserError

__all__ = ["NETWORK", "NODE", "VARIABLE", "Measurement", "Table", "choose", "fit", "load", "save"]

VARIABLE = "HPCML_COLLECTIVES"
"""The environment variable that names a user's table."""

PLACES = ("node", "network")
_SHIPPED = Path(__file__).with_name("collectives.toml")
_TIE = 1.05
"""An algorithm is kept for the next size while it takes at most this times the fastest's time:
rows should not alternate with the noise of measurements."""


@dataclass(frozen=True)
class Measurement:
    """The time of one algorithm in one situation."""

    place: str
    """"node" or "network"."""
    ranks: int
    operation: str
    algorithm: str
    nbytes: int
    """Payload, as the ledger counts it."""
    seconds: float


def fit(measurements: Iterable[Measurement]) -> Table:
    """The table that names the fastest algorithm of each size measured (by median).

    The change from one to the next lies at the geometric mean of the two sizes; the first row
    begins at 0, the last has no end.
    """
    times: dict[Any, dict[int, dict[str, list[float]]]] = {}
    for m in measurements:
        sizes = times.setdefault((m.place, m.ranks, m.operation), {})
        sizes.setdefault(m.nbytes, defaultdict(list))[m.algorithm].append(m.seconds)
    table: dict[str, dict[int, dict[str, list[tuple[float, str]]]]] = {}
    for (place, ranks, operation), sizes in sorted(times.items()):
        by_operation = table.setdefault(place, {}).setdefault(ranks, {})
        by_operation[operation] = _rows(
            {
                nbytes: {name: median(seconds) for name, seconds in found.items()}
                for nbytes, found in sorted(sizes.items())
            }
        )
    return table


def _rows(times: dict[int, dict[str, float]]) -> list[tuple[float, str]]:
    """Rows from seconds by size (ascending) and algorithm."""
    rows: list[tuple[float, str]] = []
    before, last = 0, ""
    for nbytes, found in times.items():
        fastest = min(found, key=lambda name: found[name])
        if last not in found or found[last] > _TIE * found[fastest]:
            if last:
                rows.append((float(int((before * nbytes) ** 0.5)), last))
            last = fastest
        before = nbytes
    return [*rows, (float("inf"), last)]


def save(table: Table, path: str | Path) -> None:
    """Write a table as TOML, to be named by `HPCML_COLLECTIVES`."""
    lines = ["# Fastest algorithm by operation: [up to bytes, name]. See hpcml.comm.choice."]
    for place, by_ranks in table.items():
        for ranks, by_operation in sorted(by_ranks.items()):
            lines += ["", f"[{place}.{ranks}]"]
            for operation, rows in by_operation.items():
                cells = ", ".join(f'[{_plain(limit)}, "{name}"]' for limit, name in rows)
                lines.append(f"{operation} = [{cells}]")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plain(limit: float) -> str:
    return "inf" if limit == float("inf") else str(int(limit))


def load(path: str | Path) -> Table:
    """Read a table; raises `UserError` that names the file, the key and the remedy."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{VARIABLE}={path}: no table of collectives ({reason}): {_REMEDY}"
        ) from error
    try:
        return {
            place: {
                _ranks(place, ranks): {
                    operation: _checked(f"{place}.{ranks}.{operation}", operation, rows)
                    for operation, rows in _mapping(f"{place}.{ranks}", by_operation).items()
                }
                for ranks, by_operation in _mapping(_place(place), by_ranks).items()
            }
            for place, by_ranks in found.items()
        }
    except _BadKeyError as error:
        raise UserError(f"{VARIABLE}={path}: {error}") from None


_REMEDY = "make one with hpcml bench collectives --fit FILE"


class _BadKeyError(Exception):
    """A key of the file and what is wrong with it."""


def _place(place: str) -> str:
    if place not in PLACES:
        raise _BadKeyError(f"key {place} is not one of {', '.join(PLACES)}: rename it")
    return place


def _ranks(place: str, ranks: str) -> int:
    if not ranks.isdecimal() or int(ranks) < 2:
        raise _BadKeyError(f"key {place}.{ranks}: give a number of ranks from 2 on")
    return int(ranks)


def _mapping(key: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise _BadKeyError(f"key {key} is {found!r:.40}: give a section, as in [node.2]")
    return found


def _checked(key: str, operation: str, rows: Any) -> list[tuple[float, str]]:
    """The rows of one operation."""
    if operation not in OPERATIONS:
        raise _BadKeyError(f"key {key}: name one of {', '.join(OPERATIONS)}")
    known = algorithms(operation)
    checked: list[tuple[float, str]] = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [int() | float() as limit, str(name)] if limit > (checked or [(-1, "")])[-1][0]:
                if name not in known:
                    raise _BadKeyError(
                        f"key {key}: {name!r} is not one of {', '.join(sorted(known))}: "
                        "correct it, or register it before the mesh is made"
                    )
                checked.append((float(limit), name))
            case _:
                raise _BadKeyError(
                    f"key {key} has {row!r:.60}: give [up to bytes, algorithm], bytes ascending"
                )
    return checked


@cache
def default() -> Table:
    """The table that comes with the package."""
    return load(_SHIPPED)


def given() -> Table:
    """The table that `HPCML_COLLECTIVES` names, else the default; raises like `load`.

    Ranks may see different files: `agreed` lets one read for all.
    """
    path = os.environ.get(VARIABLE)
    return load(path) if path else default()


def agreed(transport: Transport) -> Table:
    """The table that is given to the first rank: all must choose alike. Collective.

    Raises `UserError` on all ranks if its file is bad.
    """
    found: Table | UserError | None = None
    if transport.rank == 0:
        try:
            found = given()
        except UserError as error:
            found = error
    if transport.size > 1:
        link = Link(transport)
        text = np.frombuffer(pickle.dumps(found), np.uint8).copy()
        length = np.array([text.size])
        binomial(link, length, 0)
        text = text if transport.rank == 0 else np.empty(int(length[0]), np.uint8)
        binomial(link, text, 0)
        found = pickle.loads(text.tobytes())
    if isinstance(found, UserError):
        raise found
    assert found is not None, "the first rank has read it"
    return found
