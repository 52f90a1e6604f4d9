"""The options of `hpcml bench step`, what they ask for together, and its report."""

from __future__ import annotations

import argparse
from typing import Any

from hpcml.comm import launch
from hpcml.errors import UserError

PARTS, SIZES = ("time", "memory", "tensor"), ("small", "medium", "large")
PRECISIONS = ("fp32", "bf16")


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what is not common to all benchmarks."""
    command.add_argument("--part", choices=PARTS, default="time")
    command.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    command.add_argument("--peer", default="", help="also measure this library: torch")
    command.add_argument("--compile", action="store_true", help="and torch.compile, slow to begin")
    command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    command.add_argument("--threads", type=int, default=1, help="of a rank (1)")
    command.add_argument("--ranks", type=int, default=1, help="ranks, if started alone (1)")
    command.set_defaults(alone=1)


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """The report, on the first rank. Raises UserError for options that do not go together."""
    from hpcml.bench import step, step_memory, step_ranks, step_tensor
    from hpcml.comm import Mesh

    ranks = launch.read().size
    check_peer(options.peer)
    if options.threads < 1:
        raise UserError(f"--threads {options.threads}: give a rank at least 1")
    if options.compile and (not options.peer or options.part != "time" or ranks > 1):
        raise UserError("--compile is timed beside --peer torch on 1 rank: leave it, or use these")
    if options.precision != "fp32" and (options.part != "time" or ranks > 1):
        raise UserError(f"--precision {options.precision} is timed on 1 rank: leave the rest out")
    given = (options.sizes, options.peer, options.threads, options.rounds)
    if options.part == "memory":
        if ranks > 1:
            raise UserError(f"--part memory measures 1 rank, not {ranks}: leave out --ranks")
        return step_memory.run(*given)
    if options.part == "tensor":
        if ranks == 1 or options.peer:
            raise UserError("--part tensor divides a model among ranks: add --ranks 2, no --peer")
        mesh = Mesh()
        divided = step_tensor.run(mesh, options.sizes, options.threads, options.rounds)
        return divided if mesh.rank == 0 else None
    if ranks == 1:
        return step.run(*given, options.compile, options.precision)
    mesh = Mesh()
    report = step_ranks.run(mesh, *given)
    return report if mesh.rank == 0 else None


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    from hpcml.bench import step_show

    print(step_show.table(report))


def check_peer(peer: str) -> None:
    """Raise UserError for a library that no benchmark knows."""
    if peer not in ("", "torch"):
        raise UserError(f'--peer="{peer}" is unknown: use torch')
