"""Probes run in processes of their own: whatever they do, they come back as a finding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcml.comm import launch

LIMIT = 60.0
"""Seconds a probe may take. A first import on a cold network file system takes tens of them."""


@dataclass(frozen=True)
class Outcome:
    """What a probe found, or why it found nothing."""

    found: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def probe(name: str, *launcher: str, env: Mapping[str, str] | None = None) -> Outcome:
    """Run a probe of `hpcml.cli.doctor.probe`, under a launcher's command line if one is given."""
    return run([*launcher, sys.executable, "-m", "hpcml.cli.doctor.probe", name], env=env)


def run(
    command: Sequence[str], limit: float = LIMIT, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command that prints one JSON object as its last line.

    A crash, a hang beyond `limit` seconds and anything else that is no object is a failure.
    """
    environment = launch.without_launcher() | dict(env or {})
    paths = [str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,  # a launcher has children: they end with it
        )
    except OSError as error:
        return Outcome(failure=f"cannot start {command[0]} ({error.strerror})")
    with process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
            return Outcome(failure=f"no answer within {limit:.0f} s")
    return _read(process.returncode, output, errors)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process group: a launcher gets the time to end its ranks on all nodes."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            process.communicate(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _read(code: int, output: str, errors: str) -> Outcome:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        found = None
    if code == 0 and isinstance(found, dict):
        return Outcome(found)
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    elif code > 0:
        how = f"exit code {code}"
    else:
        how = "no result"
    return Outcome(failure=how + (f": {said[-1][:200]}" if said else ""))
