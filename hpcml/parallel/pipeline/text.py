"""Schedules as text: a line a rank, a word an action.

    name: mine
    # stage, kind, microbatch
    0F0 0F1 0B0 0B1
    1F0 1B0 1F1 1B1

`#` begins a comment; blank lines do not count. `name:` and `weights:` may stand anywhere; with
updates (U) and no `weights:`, weights are stashed.
"""

from __future__ import annotations

import re

from hpcml.errors import UserError
from hpcml.parallel.pipeline.actions import Action, Kind, Schedule, Weights, table

_CELL = re.compile(rf"(\d{{1,6}})({'|'.join(Kind)})(\d{{1,6}})", re.ASCII)
_KEY = re.compile(r"(\w+)\s*:\s*(.*)")


def parse(text: str, source: str = "schedule") -> Schedule:
    """Read a schedule. `source` (a file's name) is its name unless it has its own, and in errors.

    Raises UserError that names line, cell and remedy. What the table means is for `check` to judge.
    """
    keys = {"name": source, "weights": ""}
    orders: list[list[Action]] = []
    for number, line in enumerate(text.splitlines(), 1):
        content, where = line.partition("#")[0].strip(), f"{source}, line {number}"
        if key := _KEY.fullmatch(content):
            if key[1] not in keys:
                raise UserError(f'{where}: unknown key "{key[1]}": use {" or ".join(keys)}')
            keys[key[1]] = key[2]
        elif content:
            words = content.split()
            orders.append([_action(w, f"{where}, cell {i}") for i, w in enumerate(words, 1)])
    if not orders:
        raise UserError(f"{source}: no actions: write a line for each rank, such as 0F0 0B0")
    updates = any(action.kind is Kind.UPDATE for order in orders for action in order)
    usual = Weights.STASHED if updates else Weights.SYNCHRONOUS
    weights = keys["weights"] or usual
    if weights not in list(Weights):
        raise UserError(f'{source}: weights: "{weights}" is unknown: use {", ".join(Weights)}')
    return table(keys["name"], orders, Weights(weights))


def write(schedule: Schedule) -> str:
    """The text of a schedule, which `parse` reads back as the same schedule."""
    head = [f"name: {schedule.name}"]
    if not schedule.synchronous:
        head.append(f"weights: {schedule.weights}")
    return "".join(f"{line}\n" for line in [*head, *map(words, schedule.orders)])


def words(order: tuple[Action, ...]) -> str:
    """The actions of a rank as a line of text."""
    return " ".join(map(str, order))


def _action(word: str, where: str) -> Action:
    match = _CELL.fullmatch(word)
    if match is None:
        raise UserError(
            f'{where}: "{word}" is no action: write stage, kind and microbatch, such as 0F3 '
            "(F forward, B backward, I and W its halves, U update)"
        )
    return Action(int(match[1]), Kind(match[2]), int(match[3]))
