"""What the parts of the check of the GPU share: rows that are told when they are known, jobs.

A part prints its findings as lines of JSON among whatever else it prints: `{"row": {...}}` is a row
of its table, `{"asked": {...}}` a figure that was asked for beside the one that was reached, any
other object what it found besides. So what is known counts though a part fails or is ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hpcml.comm import child, launch

END = "HPCML_GPU_END"
"""When a part will be ended, by the machine's clock (`time.monotonic`)."""
MARK = "HPCML_GPU_JOB"
"""The jobs that a process belongs to, in the environment that all of their processes inherit."""
ROOT = Path(__file__).resolve().parent.parent
_LAST = 5.0
"""Seconds before its end in which a part tells what came of its jobs."""
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b|.{0,40}\berror: |.*EXIT STRING: ")
_number = itertools.count()

Row = dict[str, Any]
T = TypeVar("T")


def say(**found: Any) -> None:
    """Print an object of JSON."""
    print(json.dumps(found), flush=True)


def tell(row: Row) -> None:
    """Print a row of the part's table."""
    say(row=row)


def asked(what: str, least: float, reached: float | None) -> None:
    """Print what was asked for and what was reached; None where nothing was."""
    verdict = "not shown" if reached is None else "held" if reached >= least else "missed"
    say(asked={"what": what, "at least": least, "reached": reached, "verdict": verdict})


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """Tell the row `about` with what `measure` adds to it, or with its error."""
    try:
        row = about | measure()
    except Exception as error:  # noqa: BLE001 - one failure is a row, and stops no other
        row = about | {"error": f"{type(error).__name__}: {error}"[:300]}
    tell(row)
    return row


def left() -> float:
    """Seconds until the jobs of this part must have ended; ten minutes if nobody has said when."""
    now = time.monotonic()
    return float(os.environ.get(END) or now + 600.0) - now - _LAST


def shares(names: Sequence[T], weights: Sequence[float] = ()) -> Iterator[tuple[T, float]]:
    """Each name with the seconds it may take: what is left, shared by those that are to come."""
    weights = weights or (1.0,) * len(names)
    for position, name in enumerate(names):
        yield name, max(left() * weights[position] / sum(weights[position:]), 1.0)


def marked(environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment of a new job, and the mark by which all of its processes are found."""
    mark = f";{os.getpid()}.{next(_number)};"
    return dict(environ) | {MARK: environ.get(MARK, "") + mark}, mark


def end(mark: str) -> None:
    """End a job with all it has started, which may have sessions of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended, or be another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            if any(v.startswith(MARK.encode() + b"=") and mark.encode() in v for v in variables):
                os.kill(int(process.name), signal.SIGKILL)


def follow(
    command: Sequence[str], limit: float, env: Mapping[str, str], each: Callable[[Row], None] = tell
) -> str:
    """Run a command for at most `limit` seconds; how it failed, or an empty string.

    `each` is called with each row it tells, at once; what else it prints is passed on.
    """
    environment, mark = marked(env)
    until, printed = time.monotonic() + limit, deque[str](maxlen=60)
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"cannot be started: {error}"
    with process:
        threading.Thread(target=_watch, args=(process, limit, mark), daemon=True).start()
        assert process.stdout
        for line in process.stdout:
            found = parsed(line)
            if "row" in found:
                each(found["row"])
                continue
            print(line, end="", flush=True)
            printed.append(line)
    code = process.returncode
    if time.monotonic() > until:
        return f"not done after {limit:.0f} s: {reason(printed)}"
    return f"exit code {code}: {reason(printed)}" if code else ""


def _watch(process: subprocess.Popen[str], limit: float, mark: str) -> None:
    """End a job that takes too long, or what is left of it when its first process has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)
    end(mark)


def reason(lines: Iterable[str]) -> str:
    """The line that says best why something failed: the last one of an error, else the last one."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if _ERROR.match(line)]
    return (errors or said or [""])[-1][:300]


def parsed(line: str) -> Row:
    """The object of JSON that a line is; an empty one if it is none."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            return found if isinstance(found, dict) else {}
    return {}


def ranks(
    count: int, program: Sequence[str], limit: float, env: Mapping[str, str],
    each: Callable[[Row], None] = tell,
) -> str:  # fmt: skip
    """Run Python with `program` as so many ranks under mpiexec, as `follow` does."""
    environment = launch.without_launcher() | child.PERMISSIVE | dict(env)
    environment.setdefault("OMP_NUM_THREADS", "1")  # or ranks fight over the cores
    # Where each rank is, is told before the job is ended for taking too long.
    environment.setdefault("HPCML_TIMEOUT", f"{max(limit / 2, 1):.0f}")
    command = [child.find_mpiexec() or "mpiexec", "-n", str(count), sys.executable, *program]
    return follow(command, limit, environment, each)


def in_turn(
    count: int, program: Sequence[str], names: Sequence[str], about: Row, limit: float,
    env: Mapping[str, str],
) -> None:  # fmt: skip
    """Let a job of ranks do one after the other what `names` says, and tell its rows.

    The job is given the names and tells rows whose "name" is one of them. Where it dies, the one
    that it was at gets a row that says so, and another job goes on with those after it.
    """
    todo, until = list(names), time.monotonic() + limit

    def each(row: Row) -> None:
        if row.pop("done", False):
            todo.remove(row["name"])
        else:
            tell(about | row)

    while todo:
        failure = ranks(count, [*program, *todo], max(until - time.monotonic(), 1.0), env, each)
        if not todo:
            return
        if time.monotonic() > until:
            tell(about | {"name": todo.pop(0), "error": failure[:300]})
            for name in todo:
                error = f"not reached in the {limit:.0f} s that all of these ranks had"
                tell(about | {"name": name, "error": error})
            return
        tell(about | {"name": todo.pop(0), "error": (failure or "nothing told")[:300]})
