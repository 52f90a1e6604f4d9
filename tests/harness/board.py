"""What the ranks of a job leave for whoever reports on it: a folder on this machine.

Each rank writes its process id, the test it is in and, by itself or when asked by `SIGNAL`, the
stacks of all its threads, into files of its own. Signals and files work where a rank can do nothing
more: blocked in MPI, stuck in a compiled loop, or gone.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SIGNAL = signal.SIGUSR2
"""Asks a rank for its stacks."""
VARIABLE = "HPCML_TEST_BOARD"
"""Environment variable with the folder, where an observer has made one."""
FINISHED = "after the last test"
_SETTLE = 1.0
"""Seconds for ranks to write their stacks unasked, and for the others to stop somewhere. Asking at
once is dangerous: the handler may read the frames of a thread that is just changing them."""
_ANSWER = 3.0
"""Seconds a rank has to answer; the handler of faulthandler runs at once, even within MPI."""
_MACHINERY = re.compile(r'  File "(.*/(_pytest|pluggy|pytest|tests/harness)/|<frozen runpy>)')
_WATCHING = re.compile(r'  File ".*/(threading.py|tests/harness/\w+.py)"')


@dataclass(frozen=True)
class Position:
    """Where a rank was when it last wrote."""

    rank: int
    pid: int
    test: str
    seconds: float
    """Since it started that test."""


class Board:
    """The folder, as a rank (`join`, `at`, `report`, `dump`) or an observer (the rest) uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stacks: IO[str] | None = None

    def join(self, rank: int) -> None:
        """Make this process rank `rank` of the board, ready to answer."""
        self.rank = rank
        self._stacks = (self.folder / f"{rank}.stacks").open("w", encoding="utf-8")
        faulthandler.register(SIGNAL, file=self._stacks, all_threads=True)
        self.at("before the first test")

    def leave(self) -> None:
        """Answer no more, so that the folder may be deleted."""
        faulthandler.unregister(SIGNAL)
        if self._stacks:
            self._stacks.close()
            self._stacks = None

    def at(self, test: str) -> None:
        """Note that this rank starts `test`."""
        temporary = self.folder / f"{self.rank}.new"
        temporary.write_text(f"{os.getpid()}\n{time.time()}\n{test}\n", encoding="utf-8")
        temporary.replace(self.folder / f"{self.rank}.position")

    def report(self, text: str) -> None:
        """Leave a failure that this rank may not get to tell the others."""
        (self.folder / f"{self.rank}.report").write_text(text, encoding="utf-8")

    def dump(self) -> None:
        """Write this rank's stacks unasked. The caller holds the interpreter: no thread moves."""
        if self._stacks:
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def claim(self) -> bool:
        """Whether this caller is the first, who reports for all."""
        return self.take("claim")

    def take(self, name: str) -> bool:
        """Whether this caller is the first of all processes to take what has this name."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def claimed(self) -> bool:
        """Whether somebody has reported for all."""
        return (self.folder / "claim").exists()

    def positions(self) -> list[Position]:
        """Where each rank of this machine is, in order of rank."""
        found = []
        for path in self.folder.glob("*.position"):
            pid, started, test = path.read_text(encoding="utf-8").splitlines()[:3]
            found.append(Position(int(path.stem), int(pid), test, time.time() - float(started)))
        return sorted(found, key=lambda position: position.rank)

    def collect(self, why: str) -> str:
        """Ask every rank for its stacks; the text to print: reason, failures so far, stacks."""
        positions = self.positions()
        alive = [position for position in positions if _signal(position.pid, 0)]
        self._wait(alive, _SETTLE)
        for position in alive:
            if not self._read(f"{position.rank}.stacks"):
                _signal(position.pid, SIGNAL)
        self._wait(alive, _ANSWER)
        parts = [f"\n{' ' + why + ' ':=^100}\n"]
        for position in positions:
            parts.append(
                f"{f' rank {position.rank} ':-^100}\n"
                f"pid {position.pid}, {position.seconds:.1f} s in {position.test}\n"
            )
            report = self._read(f"{position.rank}.report")
            if report:
                parts.append(f"failed:\n{report.rstrip()}\n")
            if position not in alive:
                parts.append("the process is gone\n")
            else:
                parts.append(_readable(self._read(f"{position.rank}.stacks")))
        return "".join(parts) + "=" * 100 + "\n"

    def kill(self) -> None:
        """End all ranks but the caller, unless their numbers are other processes' by now."""
        for position in self.positions():
            if position.pid != os.getpid() and _is_test_run(position.pid):
                _signal(position.pid, signal.SIGKILL)

    def _wait(self, positions: list[Position], patience: float) -> None:
        """Until the stacks of all are there and grow no more, or patience ends."""
        deadline = time.monotonic() + patience
        before: list[int] = []
        while time.monotonic() < deadline:
            sizes = [len(self._read(f"{position.rank}.stacks")) for position in positions]
            if sizes == before and all(sizes):
                return
            before = sizes
            time.sleep(0.2)

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def write(descriptor: int, text: str) -> None:
    """Write all of it, whatever the state of Python's own streams."""
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]


def _signal(pid: int, number: int) -> bool:
    """Send a signal, 0 for none; whether the process exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_test_run(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # gone, or no such files on this system
        return False
    return b"pytest" in command or b"tests.harness" in command


def _readable(stacks: str) -> str:
    """The stacks without what is alike in all: pytest's frames, and threads that only watch."""
    if not stacks:
        return "the process does not answer\n"
    kept = []
    for thread in re.split(r"\n\n", stacks.strip()):
        header, *frames = thread.splitlines()
        if all(_WATCHING.match(frame) for frame in frames):
            continue
        own = [frame for frame in frames if not _MACHINERY.match(frame)]
        kept += [header, *(own or ["  between tests, or waiting for other ranks to end this one"])]
    return "\n".join(kept) + "\n"
