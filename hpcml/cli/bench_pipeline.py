"""The options of `hpcml bench pipeline`, its picture, and its report."""

from __future__ import annotations

import argparse
from typing import Any

from hpcml.cli.bench_jobs import check_writable
from hpcml.cli.bench_step import SIZES, check_peer
from hpcml.errors import UserError
from hpcml.pictures import check_picture

SCHEDULES = ("naive", "gpipe", "1f1b", "interleaved", "zero-bubble")


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what is not common to all benchmarks."""
    command.add_argument("--sizes", nargs="+", choices=SIZES, default=["medium"], help="(medium)")
    text = f"({' '.join(SCHEDULES)})"
    command.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME", help=text)
    command.add_argument("--microbatches", type=int, default=8, help="of a step (8)")
    command.add_argument("--peer", default="", help="also measure this library: torch")
    command.add_argument("--threads", type=int, default=1, help="of a rank (1)")
    command.add_argument("--plot", metavar="FILE", help="draw the schedules beside theory")
    command.add_argument("--ranks", type=int, default=2, help="ranks, if started alone (2)")
    command.set_defaults(alone=None)


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """The report, on the first rank. Raises UserError for what cannot be measured."""
    from hpcml.bench import pipeline, pipeline_show
    from hpcml.comm import Mesh
    from hpcml.comm.guard import agree
    from hpcml.parallel.pipeline import SCHEDULES as KNOWN

    mesh = Mesh()

    def check() -> None:
        check_peer(options.peer)
        for name in ("threads", "microbatches"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
        for name in options.schedules:
            if name not in KNOWN:
                raise UserError(f"--schedules {name}: use {', '.join(KNOWN)}")
        if options.plot:
            check_writable(options.plot)
            check_picture(options.plot)
        if mesh.size < 2:
            raise UserError("a pipeline of 1 rank: start 2 or more")

    agree(mesh.world, check)
    report, drawn = pipeline.run(
        mesh, options.sizes, options.schedules, options.microbatches, options.peer,
        options.threads, options.rounds,
    )  # fmt: skip
    if mesh.rank > 0:
        return None
    if options.plot:
        pipeline_show.plot(report, drawn, options.plot)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    from hpcml.bench import pipeline_show

    print(pipeline_show.table(report))
