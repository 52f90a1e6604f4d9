"""Where the time of a GPT training step goes: operators by pass, the optimizer, and Python.

What counts as what. *Work* is the time inside compiled kernels, and inside functions of NumPy that
are given 4 KiB or more. All other time of the step is *overhead*: the record of operations and the
walk back through it, calls of modules, tensors, accounts of memory, checks of shapes, the ledger,
freeing arrays, and NumPy on small arrays or through methods and operators. Nothing that is not
seen to be work counts as work, so the overhead is an upper bound, with one exception: what it takes
to call a compiled kernel and unpack its arrays happens inside the clock, so it is measured apart,
by kernels that have nothing to do, and moved from work to overhead.

How it is measured. Steps alternate, one as it is and one with clocks around primitives, adjoints,
kernels and NumPy's functions (`profile_hooks`). Overhead is the time of a clocked step less the
work in it and less what the clocks cost, which is calibrated: a difference within one step, so that
a machine that drifts does not matter to it. Figures are means over the middle half of the clocked
steps by their time, so that they add up; the step as it is stands beside them, so that the
disturbance can be seen.

Beside it the *floor*: the same program on arrays of next to nothing, one sample of one token and a
width of one a head, where everything is overhead. There the caches hold the interpreter's code and
data; in a real step the arrays drive them out, and Python takes longer. The floor is what could be
reached by better caching, not by less Python.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hpcml import backend, kernels
from hpcml.bench.profile_hooks import BACKWARD, FORWARD, UPDATE, Profile, cost, dispatch
from hpcml.bench.rounds import alternate
from hpcml.bench.step import Size, batch_of, our_step, rounds_for

_WARM = 3

Row = dict[str, Any]
Costs = dict[str, tuple[float, float]]


def run(size: Size) -> dict[str, Any]:
    """Profile steps of one size on one thread; the report as plain values, times in seconds."""
    from hpcml.train.environment import cpu, gemm_library, versions

    backend.set_threads(1)
    step, batch = our_step(size), batch_of(size)
    for _ in range(_WARM):
        step(batch)
    plain, profiles = [], []
    module = kernels.compiled("float32")
    for _ in range(rounds_for(size)):
        start = time.perf_counter()
        step(batch)
        plain.append(time.perf_counter() - start)
        profile = Profile()
        with profile.hung_up(module):
            step(batch)  # new functions are slow at first
            with profile.step():
                step(batch)
        profiles.append(profile)
    costs, call = cost(), dispatch()
    profiles.sort(key=lambda profile: profile.begun[-1] - profile.begun[0])
    quarter = len(profiles) // 4
    middle = [account(p, costs, call) for p in profiles[quarter : len(profiles) - quarter]]
    return {
        "bench": "profile",
        "version": 1,
        "size": asdict(size),
        "threads": 1,
        "cpu": cpu(),
        "gemm": gemm_library(),
        "packages": versions(),
        "rounds": len(profiles),
        "plain": statistics.median(plain),
        "call": call * 1e-9,
        "floor": floor(size),
        **mean(middle),
    }


def floor(size: Size) -> float:
    """Seconds of a step with as many layers and heads on arrays of next to nothing."""
    tiny = Size(size.layers, size.heads, size.heads, 1, 1)
    step = our_step(tiny)
    times = alternate(step.mesh.world, {"ours": partial(step, batch_of(tiny))}, rounds=100)
    return float(np.median(times["ours"]))


def account(profile: Profile, costs: Costs, call: float) -> dict[str, Any]:
    """One clocked step in seconds, less what the clocks cost.

    costs, call: nanoseconds of each clock (`profile_hooks.cost`) and of calling a kernel.
    """
    (shown, whole), (work_shown, work_whole) = costs["primitive"], costs["work"]
    rows: list[Row] = []
    for (name, part), span in profile.spans.items():
        if not span.calls:
            continue
        compiled = span.works if not name.startswith("np.") else 0
        work = span.work - span.works * (work_shown + (call if compiled else 0))
        if part == "alone":
            seconds = span.nanoseconds - span.calls * work_shown
        else:
            seconds = span.nanoseconds - span.calls * shown - span.works * work_whole
            seconds -= span.others * (whole - shown)
        rows.append({"name": name, "part": part, "calls": span.calls, "works": span.works,
                     "seconds": seconds * 1e-9, "work": work * 1e-9})  # fmt: skip
    between = {}
    for phase, label in ((FORWARD, "forward"), (BACKWARD, "backward"), (UPDATE, "update")):
        passed = profile.begun[phase + 1] - profile.begun[phase] - profile.clocked[phase]
        primitives, works = profile.outermost[phase]
        clocks = primitives * (whole - shown) + works * (work_whole - work_shown)
        between[label] = (passed - clocks) * 1e-9
    total = math.fsum([*(row["seconds"] for row in rows), *between.values()])
    clocked = (profile.begun[-1] - profile.begun[0]) * 1e-9
    return {"rows": rows, "between": between, "step": total, "clocks": clocked - total}


def mean(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several accounts of the same program, and what it amounts to."""
    count = len(steps)
    rows = []
    for same in zip(*(step["rows"] for step in steps), strict=True):
        sums = {key: sum(row[key] for row in same) / count for key in ("seconds", "work")}
        rows.append(same[0] | sums)
    rows.sort(key=lambda row: -row["seconds"])
    between = {
        phase: sum(step["between"][phase] for step in steps) / count
        for phase in steps[0]["between"]
    }
    total = sum(step["step"] for step in steps) / count
    work = sum(row["work"] for row in rows)
    around = sum(row["seconds"] for row in rows) - work
    return {
        "step": total,
        "clocks": sum(step["clocks"] for step in steps) / count,
        "rows": rows,
        "between": between,
        "work": work,
        "around": around,
        "overhead": around + sum(between.values()),
        "overhead_share": (around + sum(between.values())) / total,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    step = report["step"]

    def line(name: str, part: str, calls: str, seconds: float, work: float | None) -> str:
        cells = "" if work is None else f"{work * 1e3:9.3f} {(seconds - work) * 1e3:9.3f}"
        return f"{name:24} {part:10} {calls:>5} {seconds * 1e3:9.3f} {seconds / step:6.1%} {cells}"

    lines = [
        line(row["name"], row["part"].replace("alone", ""), str(row["calls"]), row["seconds"],
             row["work"])
        for row in report["rows"]
    ]  # fmt: skip
    for phase, seconds in report["between"].items():
        lines.append(line("between them", phase, "", seconds, None))
    lines += [line(name, "", "", report[name], None) for name in ("work", "overhead")]
    title = (
        f"a step of {Size(**report['size'])}, fp32, 1 thread, {report['cpu']}, GEMM by "
        f"{report['gemm']}: {report['plain'] * 1e3:.2f} ms as it is; profile of "
        f"{report['rounds']} steps: {step * 1e3:.2f} + {report['clocks'] * 1e3:.2f} ms of clocks"
    )
    heads = f"{'':24} {'':10} {'calls':>5} {'ms':>9} {'share':>6} {'work':>9} {'around':>9}"
    last = (
        f"floor: the same program on arrays of next to nothing takes {report['floor'] * 1e3:.2f} "
        f"ms, {report['floor'] / step:.1%}; calling a kernel takes {report['call'] * 1e6:.2f} µs"
    )
    return "\n".join(line.rstrip() for line in (title, heads, *lines, last))
