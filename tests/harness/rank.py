"""One rank of a test run: pytest in a child process, and a parent that outlives it.

A launcher ends the other ranks the moment one is gone, and tells at best a process number. It does
not notice the end of the child as long as this parent holds the same connection to it, so there is
time to say which rank has gone in which test, and what the others were doing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.harness import orphans
from tests.harness.board import FINISHED, VARIABLE, Board, write

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run pytest with this command's arguments; its exit status, or 1 if it was cut short."""
    # Of this rank's own. When pytest ends it clears away what it takes for remains of earlier runs:
    # folders of the neighbours too, which then complain about each other.
    folder = tempfile.mkdtemp(prefix="hpcml-rank-")
    try:
        return _run(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: str) -> int:
    board = Board(Path(os.environ[VARIABLE]))
    orphans.adopt()
    pid = os.fork()
    if pid == 0:
        _end_with_parent()
        import pytest

        return int(pytest.main([*sys.argv[1:], f"--basetemp={folder}/tests"]))
    status = _await(pid)
    code = os.waitstatus_to_exitcode(status)
    for position in board.positions():
        if position.pid == pid and position.test != FINISHED:
            if board.claim():
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                write(2, board.collect(f"rank {position.rank} ended {how} in {position.test}"))
                time.sleep(0.5)  # the launcher forwards output on its own; let it do so
                board.kill()  # not all launchers do, and not always
            return 1
    return code if code >= 0 else 1


def _await(pid: int) -> int:
    """The status with which a child ends; what loses its parent meanwhile is not left a zombie."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return status


def _end_with_parent() -> None:
    """Have the kernel kill this process when the launcher kills its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
