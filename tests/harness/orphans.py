"""The end of everything that a run has started, whatever sessions and parents it has by now.

A test starts jobs in sessions of their own, and jobs start ranks. When the test is killed, nobody
is left who knows of them; so they become children of a process that outlives the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE = 5.0
"""Seconds for killed processes to be gone."""


def adopt() -> None:
    """Have the kernel make processes below this one that lose their parent its own children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end() -> None:
    """Kill all processes below this one."""
    deadline = time.monotonic() + _PATIENCE
    while (found := _below(os.getpid())) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _below(ancestor: int) -> list[int]:
    """Numbers of the processes whose parents' parents' ... parent this one is."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # of "12 (any name) S 11 ..."
            children[int(fields[1])].append(int(stat.parent.name))
    found = list(children[ancestor])
    for pid in found:
        found += children[pid]
    return found
