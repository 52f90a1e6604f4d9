"""`hpcml schedule show|check|simulate NAME_OR_FILE`: pipeline schedules, without MPI or a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from hpcml.parallel.pipeline import Costs, Schedule, ScheduleError, Simulation, find, lower
from hpcml.parallel.pipeline.draw import broken, grid
from hpcml.parallel.pipeline.find import MICROBATCHES, RANKS
from hpcml.parallel.pipeline.simulate import simulate
from hpcml.parallel.pipeline.text import words, write


def run(args: list[str]) -> int:
    """Find a schedule and show, check or simulate it; the exit code."""
    options = _parser().parse_args(args)
    schedule = find(
        options.schedule,
        options.ranks,
        options.microbatches,
        options.chunks,
        update_every=options.update_every,
        vertical_sync=options.vertical_sync or None,
    )
    try:
        report = options.command(schedule, options)
    except ScheduleError as error:
        if options.json:
            cells = [{"rank": rank, "cell": cell + 1} for rank, cell in sorted(error.cells)]
            print(json.dumps({"valid": False, "error": error.report(), "cells": cells}))
        else:
            print(broken(schedule, error))
        raise
    print(json.dumps(report[1], indent=1) if options.json else report[0])
    return 0


Report = tuple[str, dict[str, Any]]
"""What a command found, for people and for programs."""


def _show(schedule: Schedule, options: argparse.Namespace) -> Report:
    drawn = grid(simulate(lower(schedule), Costs.parse(options.cost, options.latency)))
    heading = "".join(f"# {line}\n" for line in [str(schedule), *drawn.splitlines()])
    orders = [words(order).split() for order in schedule.orders]
    return (heading + write(schedule)).rstrip(), _sizes(schedule) | {"orders": orders}


def _check(schedule: Schedule, options: argparse.Namespace) -> Report:
    simulate(lower(schedule), synchronous=True)
    found = f"{schedule}: complete, in order, and free of deadlock even with synchronous sends"
    return found, {"valid": True} | _sizes(schedule)


def _simulate(schedule: Schedule, options: argparse.Namespace) -> Report:
    costs = Costs.parse(options.cost, options.latency)
    found = simulate(lower(schedule), costs, synchronous=options.synchronous)
    ranks = [
        {"rank": rank, "busy": busy, "idle": idle, "peak_activations": peak}
        for rank, (busy, idle, peak) in enumerate(
            zip(found.busy, found.idle, found.peaks, strict=True)
        )
    ]
    stages = [
        {"stage": stage, "rank": rank, "weight_versions": versions, "staleness": late}
        for stage, (rank, versions, late) in enumerate(
            zip(schedule.rank_of, found.versions, found.staleness, strict=True)
        )
    ]
    events = [
        {"rank": rank, "action": str(action), "start": start, "end": end}
        for rank, events in enumerate(found.events)
        for action, start, end in events
    ]
    whole = {
        "makespan": found.makespan,
        "bubble": found.bubble,
        "bubble_of_ideal": found.bubble_of_ideal,
    }
    report = {"per_rank": ranks, "per_stage": stages, "events": events}
    return _tables(schedule, found, ranks, stages), _sizes(schedule) | whole | report


def _tables(
    schedule: Schedule,
    found: Simulation,
    ranks: list[dict[str, Any]],
    stages: list[dict[str, Any]],
) -> str:
    lines = [str(schedule), grid(found), "", "rank      busy   idle  most activations kept"]
    lines += [
        f"{row['rank']:<4}{row['busy']:>10g}{row['idle']:>7.1%}  {row['peak_activations']}"
        for row in ranks
    ]
    if not schedule.synchronous:
        lines += ["", "stage  rank  versions of weights  updates that gradients are old"]
        lines += [
            f"{row['stage']:<7}{row['rank']:<6}{row['weight_versions']:<21}{row['staleness']}"
            for row in stages
        ]
    bubble = f"bubble {found.bubble:.1%} of the time, {found.bubble_of_ideal:.1%} of the busy time"
    return "\n".join([*lines, "", f"makespan {found.makespan:g}, {bubble}"])


def _sizes(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "weights": str(schedule.weights),
    }


def _parser() -> argparse.ArgumentParser:
    about = "Pipeline schedules as tables: draw them, check them, run them with given costs."
    parser = argparse.ArgumentParser(prog="hpcml schedule", description=about)
    commands = parser.add_subparsers(dest="name", required=True, metavar="show|check|simulate")

    def add(name: str, command: Callable[..., Report], text: str, costs: bool = True) -> Any:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(command=command)
        what = "a name, a file, or package.module:function"
        found.add_argument("schedule", metavar="NAME_OR_FILE", help=what)
        found.add_argument("--ranks", type=int, help=f"({RANKS}, or what the file is for)")
        text = f"({MICROBATCHES}, or what the file is for)"
        found.add_argument("--microbatches", type=int, help=text)
        found.add_argument("--chunks", type=int, help="stages a rank of interleaved (2)")
        text = "of pipedream: all stages use the weights' version of the first"
        found.add_argument("--vertical-sync", action="store_true", help=text)
        text = "microbatches an update of pipedream-2bw (as many as ranks)"
        found.add_argument("--update-every", type=int, help=text)
        found.add_argument("--json", action="store_true", help="print JSON")
        if costs:
            text = "of kinds, or of a stage's, such as F=1,B=2,3F=1.5,sendF=0.1 (F=1,B=2)"
            found.add_argument("--cost", default="", help=text)
            found.add_argument("--latency", type=float, default=0.0, help="of a message (0)")
        return found

    add("show", _show, "print a schedule: its grid, and its table as a file holds it")
    add("check", _check, "say what is wrong with a schedule, if anything", costs=False)
    text = "run a schedule: times, bubble, activations, versions of weights"
    simulation = add("simulate", _simulate, text)
    text = "sends wait for their receives"
    simulation.add_argument("--synchronous", action="store_true", help=text)
    return parser
