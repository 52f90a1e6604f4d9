"""`hpcml bench step|pipeline|profile|start|collectives|...`: see `hpcml bench NAME --help`."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from typing import Any

from hpcml.cli import bench_jobs, bench_pipeline, bench_step
from hpcml.cli.bench_jobs import check_writable, job
from hpcml.comm import launch
from hpcml.comm.algorithms import OPERATIONS
from hpcml.errors import UserError
from hpcml.pictures import check_picture

ZERO_PARTS = ("states", "time", "models", "batches")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")


def run(args: list[str]) -> int:
    """Run a benchmark and print its table, or with --json its report; the exit code.

    Those of communication need several ranks: started alone, they start a job of their own.
    """
    options = _parser().parse_args(args)
    if getattr(options, "rounds", 0) < 0:
        raise UserError(f"--rounds {options.rounds}: give 0 (as many as it takes) or more")
    threads = getattr(options, "memory_limit", None) is not None  # its ranks are threads
    several = "ranks" in options and options.ranks != options.alone and not threads
    if several and launch.read().size == 1:
        return _in_a_job(options.ranks, args)
    report: dict[str, Any] | None = options.measure(options)
    if report is None:  # another rank speaks
        return 0
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        options.show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcml bench", description="Measure, beside a peer.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    def add(name: str, measure: Callable[..., Any], show: Callable[..., Any], text: str) -> Any:
        command = names.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure, show=show)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        return command

    text = "a GPT training step: its time on one rank or by layout on several, or its memory"
    step = add("step", bench_step.measure, bench_step.show, text)
    bench_step.add_options(step)

    profile = add("profile", _profile, _show_profile, "where the time of a training step goes")
    sizes = bench_step.SIZES
    profile.add_argument("--size", choices=sizes, default="small", help="of those of step (small)")

    text = "a GPT training step in a pipeline: time and bubble of every schedule, beside theory"
    pipeline = add("pipeline", bench_pipeline.measure, bench_pipeline.show, text)
    bench_pipeline.add_options(pipeline)

    bench_jobs.add_start(add)
    bench_jobs.add_scaling(add)

    text = "convolutions of ResNet's layers, forward and both backward passes, or a whole step"
    conv = add("conv", _conv, _show_conv, text)
    conv.add_argument("--part", choices=("shapes", "step"), default="shapes")
    conv.add_argument("--peer", default="", help="also measure this library: torch")
    conv.add_argument("--ranks", type=int, default=1, help="of a step, if started alone (1)")
    conv.set_defaults(alone=1)

    text = "the collectives: every algorithm beside the MPI library, 1 KiB to 64 MiB"
    some = add("collectives", _collectives, _show_collectives, text)
    some.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    some.add_argument("--dtype", choices=DTYPES, default="float32")
    some.add_argument("--min", type=_bytes, default=1 << 10, help="smallest size, such as 1K")
    some.add_argument("--max", type=_bytes, default=1 << 26, help="largest size; 4 x steps between")
    some.add_argument("--peer", default="", help="also measure all-reduce of this library: torch")
    some.add_argument("--plot", metavar="FILE", help="draw times and bus bandwidths")
    some.add_argument("--fit", metavar="FILE", help="write the table of the fastest algorithms")
    text = "halo exchange in 1, 2 and 3 dimensions beside its estimate"
    halo = add("halo", _halo, _show_halo, text)
    text = "time of divided convolutions by layer, beside the cost model of the paper"
    halo.add_argument("--layers", action="store_true", help=text)
    text = "how large an image trains with so many bytes a rank (16M), on 1, 2 and 4 ranks"
    halo.add_argument("--memory-limit", nargs="?", const=1 << 24, type=_bytes, help=text)
    text = "what a communication thread hides of an all-reduce beside compute"
    overlap = add("overlap", _overlap, _show_overlap, text)
    for command in (some, halo, overlap):
        command.add_argument("--ranks", type=int, default=2, help="ranks, if started alone (2)")
        command.set_defaults(alone=None)
    text = "ZeRO by stage: memory, traffic, time, and what fits, beside the paper's formulas"
    zero = add("zero", _zero, _show_zero, text)
    text = "if started alone: a job of each so many ranks (1 2 4 8)"
    zero.add_argument("--ranks", dest="jobs", nargs="+", type=int, default=[1, 2, 4, 8], help=text)
    zero.add_argument("--part", nargs="+", choices=ZERO_PARTS, default=ZERO_PARTS)
    zero.add_argument("--layers", type=int, default=4, help="of the GPT of states and time (4)")
    zero.add_argument("--width", type=int, default=384, help="of the same (384)")
    for command in (step, pipeline, conv, some, halo, overlap, zero):
        command.add_argument("--rounds", type=int, default=0, help="repetitions (a second's)")
    return parser


def _bytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def _in_a_job(ranks: int, args: list[str]) -> int:
    """Run the same command with several ranks under mpiexec; its exit code."""
    if ranks < 2:
        raise UserError(f"--ranks {ranks}: communication needs 2 ranks or more")
    return job(ranks, ["-m", "hpcml", "bench", *args]).returncode


def _profile(options: argparse.Namespace) -> dict[str, Any]:
    from hpcml.bench import profile
    from hpcml.bench.step import SIZES

    return profile.run(SIZES[options.size])


def _show_profile(report: dict[str, Any]) -> None:
    from hpcml.bench import profile

    print(profile.table(report))


def _conv(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import conv
    from hpcml.comm import Mesh

    bench_step.check_peer(options.peer)
    ranks = launch.read().size
    if options.part == "shapes" and ranks > 1:
        raise UserError(f"--part shapes measures 1 rank, not {ranks}: add --part step")
    mesh = Mesh()
    report = conv.run(mesh, options.part, options.peer, options.rounds)
    return report if mesh.rank == 0 else None


def _show_conv(report: dict[str, Any]) -> None:
    from hpcml.bench import conv

    print(conv.table(report))


def _collectives(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import collectives, show
    from hpcml.comm import Mesh
    from hpcml.comm.guard import agree

    def prepare() -> Any:  # what may be wrong is found now, not after minutes
        bench_step.check_peer(options.peer)
        if options.fit and options.dtype.endswith("float16"):
            raise UserError(f"--fit with --dtype {options.dtype}: fit a type that MPI can add")
        for path in filter(None, (options.plot, options.fit)):
            check_writable(path)
        if options.plot:
            check_picture(options.plot)
        return collectives.gloo(mesh) if options.peer else None

    mesh = Mesh()
    gloo = agree(mesh.world, prepare)
    sizes = [options.min * 4**k for k in range(40) if options.min * 4**k <= options.max]
    report = collectives.run(mesh, options.operations, options.dtype, sizes, options.rounds, gloo)
    if mesh.rank > 0:
        return None
    if options.plot:
        show.plot(report, options.plot)
    if options.fit:
        collectives.save_fit(report, options.fit)
    return report


def _show_collectives(report: dict[str, Any]) -> None:
    from hpcml.bench import show

    show.tables(report)


def _halo(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import halo, halo_memory
    from hpcml.comm import Mesh

    if options.memory_limit is not None:
        if launch.read().size > 1:
            raise UserError(
                "--memory-limit with several processes: start it alone, without mpiexec"
            )
        return halo_memory.run(options.memory_limit)
    mesh = Mesh()
    report = halo.run(mesh, options.rounds, options.layers)
    return report if mesh.rank == 0 else None


def _show_halo(report: dict[str, Any]) -> None:
    from hpcml.bench import halo, halo_memory

    print(halo_memory.table(report) if "limit" in report else halo.table(report))


def _overlap(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import overlap
    from hpcml.comm import Mesh

    mesh = Mesh()
    report = overlap.run(mesh, options.rounds)
    return report if mesh.rank == 0 else None


def _show_overlap(report: dict[str, Any]) -> None:
    from hpcml.bench import overlap

    print(overlap.table(report))


def _zero(options: argparse.Namespace) -> dict[str, Any] | None:
    from hpcml.bench import zero
    from hpcml.comm import Mesh

    def here() -> dict[str, Any] | None:
        mesh = Mesh()
        found = zero.run(mesh, options.part, options.layers, options.width, options.rounds)
        return found if mesh.rank == 0 else None

    if launch.read().size > 1:
        return here()
    reports = []
    for ranks in options.jobs:
        if ranks < 1:
            raise UserError(f"--ranks {ranks}: start at least 1")
        reports.append(here() if ranks == 1 else _zero_job(ranks, options))
    return zero.together([report for report in reports if report])


def _zero_job(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    numbers = {name: str(getattr(options, name)) for name in ("layers", "width", "rounds")}
    args = ["-m", "hpcml", "bench", "zero", "--json", "--part", *options.part]
    for name, number in numbers.items():
        args += [f"--{name}", number]
    done = job(ranks, args, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"--ranks {ranks}: this job failed; what it said is above")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _show_zero(report: dict[str, Any]) -> None:
    from hpcml.bench import zero_show

    print(zero_show.table(report))
