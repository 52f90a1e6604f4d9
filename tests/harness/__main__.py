"""Run pytest with a hard limit, serially or under mpiexec: `python -m tests.harness [-n RANKS] ...`

Whatever follows the options of this command goes to pytest. The plugin inside the ranks handles
failures and hangs, the parent of each rank its death; this process handles what is left: a launcher
that hangs, a run that is too long as a whole. It ends with no process of the run left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from tests.harness.board import VARIABLE, Board

_LAUNCHER = ("PMI", "MPI_", "HYDI_", "HYDRA_", "OMPI_", "PRTE_", "SLURM_", "PBS_", "FLUX_", "JSM_")
"""Variables of an outer job, which would be mistaken for those of ours."""

_AFTER_REPORT = 20.0
"""Seconds a launcher has to end a run that has failed; now and then one never does."""


def main(arguments: list[str]) -> int:
    """Run pytest; its exit status, or 1 for a run that was ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness", allow_abbrev=False)
    parser.add_argument("-n", dest="ranks", type=int, default=0, help="ranks (0: no MPI)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the whole run")
    options, rest = parser.parse_known_args(arguments)
    command = [sys.executable, "-m", "tests.harness.rank"]
    if options.ranks:
        # Ranks that share a cache folder would race, and nobody reads what they leave there.
        command = [*_mpiexec(options.ranks), *command, "--with-mpi", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory(prefix="hpcml-test-") as folder:
        return _run([*command, *rest], Board(Path(folder)), options.limit)


def _mpiexec(ranks: int) -> list[str]:
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        sys.exit("no mpiexec beside Python or in PATH: pip install mpich")
    return [found, "-n", str(ranks)]


def _environment(board: Board) -> dict[str, str]:
    mine = {name: text for name, text in os.environ.items() if not name.startswith(_LAUNCHER)}
    mine[VARIABLE] = str(board.folder)
    # Ranks share the cores: one thread each, or they fight over them.
    mine.setdefault("OMP_NUM_THREADS", "1")
    # Open MPI refuses by default what a test machine is: a container, with fewer cores than ranks.
    mine |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mine["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    if sys.stdout.isatty():
        mine["FORCE_COLOR"] = "1"
    return mine


def _run(command: list[str], board: Board, limit: float) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=_environment(board), start_new_session=True
    )
    try:
        code = _wait(process, board, limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        board.kill()
        process.wait()
    return code if 0 <= code < 128 else 1


def _wait(process: subprocess.Popen[bytes], board: Board, limit: float) -> int:
    """The exit status of the run; 1 if it does not end by itself, in time or after its report."""
    end = time.monotonic() + limit
    reported = False
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1)
        if board.claimed() and not reported:
            reported, end = True, time.monotonic() + _AFTER_REPORT
    if not reported:
        print(board.collect(f"the run exceeded its limit of {limit:g} s"), file=sys.stderr)
    return 1


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
