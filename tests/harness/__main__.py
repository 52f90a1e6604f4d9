"""Run pytest with a hard limit: `python -m tests.harness [-n RANKS | -j PROCESSES] ...`

Under mpiexec every rank runs all tests together with the others; of several processes without MPI
each runs other test files. Whatever follows the options of this command goes to pytest. The plugin
inside the ranks handles failures and hangs, the parent of each rank its death; this process handles
what is left: a launcher that hangs, a run that is too long as a whole. It ends with no process of
the run left.
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
from typing import IO

from tests.harness import orphans
from tests.harness.board import VARIABLE, Board
from tests.harness.workers import VARIABLE as WORKER

_LAUNCHER = ("PMI", "MPI_", "HYDI_", "HYDRA_", "OMPI_", "PRTE_", "SLURM_", "PBS_", "FLUX_", "JSM_")
"""Variables of an outer job, which would be mistaken for those of ours."""

_AFTER_REPORT = 20.0
"""Seconds a launcher has to end a run that has failed; now and then one never does."""
_MOST = 4
"""Processes that share tests on a machine with many cores: tests start several ranks themselves.
On one with few it is one more than cores: many tests wait for a job that they have started."""


def main(arguments: list[str]) -> int:
    """Run pytest; its exit status, or 1 for a run that was ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness", allow_abbrev=False)
    parser.add_argument("-n", dest="ranks", type=int, default=0, help="ranks (0: no MPI)")
    parser.add_argument(
        "-j", dest="processes", type=int, default=1,
        help="processes that share tests without MPI (0: one more than cores, 4 at most)",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the whole run")
    options, rest = parser.parse_known_args(arguments)
    if options.ranks and options.processes != 1:
        parser.error(f"-n {options.ranks} -j {options.processes}: ranks run all tests together")
    processes = options.processes or min((os.cpu_count() or 1) + 1, _MOST)
    command = [sys.executable, "-m", "tests.harness.rank"]
    if options.ranks or processes > 1:
        # Processes that share a cache folder would race, and nobody reads what they leave there.
        command += ["-p", "no:cacheprovider"]
    if options.ranks:
        command = [*_mpiexec(options.ranks), *command, "--with-mpi"]
    with tempfile.TemporaryDirectory(prefix="hpcml-test-") as folder:
        return _run([*command, *rest], processes, Board(Path(folder)), options.limit)


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
    # And leave a core to the rank they wait for: of MPICH, which otherwise looks 1000 times first.
    mine.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "10")
    # And with a short sleep: ranks that wait by yielding alone are as busy, to the scheduler, as
    # those that work, and may keep a core from them.
    mine.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    # Open MPI refuses by default what a test machine is: a container, with fewer cores than ranks.
    mine |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mine["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    if sys.stdout.isatty():
        mine["FORCE_COLOR"] = "1"
    return mine


def _run(command: list[str], processes: int, board: Board, limit: float) -> int:
    """Run so many processes of this command; what all but the first print comes in the end."""
    signal.signal(signal.SIGTERM, _interrupt)
    orphans.adopt()
    environment = _environment(board)
    started: list[subprocess.Popen[bytes]] = []
    try:
        if processes == 1:
            started.append(_start(command, environment))
        for worker in range(processes if processes > 1 else 0):
            environment[WORKER] = str(worker)
            with open(_output(board, worker), "wb") as output:
                started.append(_start(command, environment, output if worker else None))
        code = _wait(started, board, limit)
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        board.kill()
        for process in started:
            process.wait()
        orphans.end()
    for worker in range(1, processes):
        print(_output(board, worker).read_text(encoding="utf-8", errors="replace"), flush=True)
    return code if 0 <= code < 128 else 1


def _start(
    command: list[str], environment: dict[str, str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, env=environment, start_new_session=True
    )


def _output(board: Board, worker: int) -> Path:
    return board.folder / f"{worker}.output"


def _wait(started: list[subprocess.Popen[bytes]], board: Board, limit: float) -> int:
    """The exit status of the run; 1 if it does not end by itself, in time or after its report."""
    end = time.monotonic() + limit
    reported = False
    while time.monotonic() < end:
        running = [process for process in started if process.poll() is None]
        if not running:
            return next((code for process in started if (code := process.returncode)), 0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(1)
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
