"""Trials in processes of their own: whatever they do, they come back as a finding."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcml.comm import launch

LIMIT = 60.0
"""Seconds a trial may take. A first import on a cold network file system takes tens of them."""

PERMISSIVE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""For Open MPI, which refuses root and more ranks than cores by default."""


@dataclass(frozen=True)
class Outcome:
    """What a trial found, or why it found nothing."""

    found: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def find_mpiexec() -> str:
    """Return the mpiexec of this Python environment, else the one in PATH, else nothing."""
    own = Path(sysconfig.get_path("scripts"), "mpiexec")
    return str(own) if own.exists() else shutil.which("mpiexec") or ""


def run(
    command: Sequence[str], limit: float = LIMIT, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command that prints one JSON object as its last line.

    A crash, a hang beyond `limit` seconds and anything else that is no object is a failure.
    """
    ended = start(command, limit, env)
    lines = [line for line in ended.output.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1]) if lines and not ended.failure else None
    except json.JSONDecodeError:
        found = None
    if isinstance(found, dict):
        return Outcome(found)
    return Outcome(failure=ended.failure or _with_reason("no result", ended.errors))


@dataclass(frozen=True)
class Ended:
    """What a command printed, and how it failed; an empty string if it did not."""

    output: str
    errors: str
    failure: str


def start(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command for at most `limit` seconds, with its children."""
    environment = launch.without_launcher() | dict(env or {})
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
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
        return Ended("", "", f"cannot start {command[0]} ({error.strerror})")
    with process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Ended(*_end(process), f"no answer within {limit:.0f} s")
    return Ended(output, errors, _how(process.returncode, output, errors))


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process group: a launcher gets the time to end its ranks on all nodes; the output."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            return process.communicate(timeout=patience)
        except ProcessLookupError:
            return process.communicate()
        except subprocess.TimeoutExpired:
            continue
    return "", ""


def _how(code: int, output: str, errors: str) -> str:
    """How a command failed, by its exit code; an empty string if it did not."""
    if code == 0:
        return ""
    # Launchers add 128 to a signal, as shells do; Hydra exits with the bare number, but prints it.
    said = re.search(r"EXIT STRING: .*\(signal (\d+)\)", output)
    number = int(said[1]) if said else code - 128
    if code < 0:
        return _with_reason(f"killed by {signal.Signals(-code).name}", errors)
    if number in {known.value for known in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return _with_reason(f"exit code {code}", errors)


def _with_reason(how: str, errors: str) -> str:
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return how + (f": {said[-1][:200]}" if said else "")
