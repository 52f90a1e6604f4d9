"""The sentinel: a process beside the ranks of a node that outlives them by a moment.

When a rank is killed, its launcher ends the others at once and prints a process number at most. The
sentinel waits for the end of every rank, and if one ends without a word (see `Sheet.take`), it
prints where all of them were, on the error output that it has from the first rank: launchers
forward that until the last process has closed it. It also ends the ranks that are left a while
after the job was to end.

It runs with the bare interpreter (`start`), hence nothing but the standard library here.
"""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress

from hpcml.comm.rollcall import roll_call
from hpcml.comm.sheet import FAILED, RUNNING, Position, Sheet

_MOMENT = 0.1
"""Seconds in which ranks that end count as having ended at once."""
_FILE = 3
"""Descriptor of the sheet's file in the sentinel."""

# Modules of the package without the package: importing that takes half a second.
_PROGRAM = """
import sys, types
for name, path in (("hpcml", sys.argv[1]), ("hpcml.comm", sys.argv[1] + "/comm")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from hpcml.comm.sentinel import main
main()
"""


def start(page: Sheet) -> None:
    """Start the sentinel of a node over its sheet, once all its ranks have joined.

    In a session of its own, as launchers end process groups. Does nothing where the ranks share no
    sheet, or processes cannot be waited for by descriptor (Linux only).
    """
    if page.file is None or not hasattr(os, "pidfd_open") or not sys.executable:
        return
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with suppress(OSError, NotImplementedError):
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _PROGRAM, package],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, page.file, _FILE),
            ],
            setsid=True,
        )


def main() -> None:
    """Watch until the last rank is gone. Never returns."""
    # Launchers notice the end of a rank by its connections, of which this process has copies.
    os.closerange(_FILE + 1, 1 << 20)
    # Opened anew: a lock of the same open file would be that of the first rank.
    page = Sheet.of_file(os.open(f"/proc/self/fd/{_FILE}", os.O_RDWR))
    with suppress(OSError):  # nobody reads the error output any more
        _watch(page)
    os._exit(0)


def _watch(page: Sheet) -> None:
    # A dying process closes its files first, among them the connection that the launcher watches,
    # and counts as dead last, when the launcher may have killed others already. So the ends of the
    # pipes tell who died first, if they are told in their order: epoll does that, poll does not.
    waiting = select.epoll()
    ranks: dict[int, Position] = {}
    pipes: dict[int, Position] = {}
    closed: list[Position] = []
    for position in page.positions():
        try:
            process = os.pidfd_open(position.pid)
        except ProcessLookupError:
            _ended(page, [position])
            continue
        ranks[process] = position
        waiting.register(process, select.EPOLLIN)
        with suppress(OSError):  # gone since
            name = f"/proc/{position.pid}/fd/{position.pipe}"
            pipe = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            pipes[pipe] = position
            waiting.register(pipe, select.EPOLLIN)
    told: float | None = None  # when to tell: a moment later, for order alone may deceive
    while ranks or told is not None:
        patience = _patience(page) if told is None else max(told - time.monotonic(), 0.0)
        for descriptor, _ in waiting.poll(patience):
            waiting.unregister(descriptor)
            if descriptor in pipes:
                closed.append(pipes[descriptor])
            else:
                closed.append(ranks.pop(descriptor))
                if told is None and _silent(page, closed):
                    told = time.monotonic() + _MOMENT
        if told is not None and time.monotonic() >= told:
            _ended(page, closed)
            told = None
        if page.deadline() and time.monotonic() > page.deadline():
            import signal  # seldom needed, and takes a while

            for process in ranks:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)


def _patience(page: Sheet) -> float:
    return 0.2 if page.deadline() else 1.0


def _silent(page: Sheet, ended: list[Position]) -> list[Position]:
    """Those of these ranks that ended without a word; none if any rank has one to say."""
    states = {position.rank: position.state for position in page.positions()}
    if FAILED in states.values():
        return []
    return [rank for rank in dict.fromkeys(ended) if states[rank.rank] == RUNNING]


def _ended(page: Sheet, ended: list[Position]) -> None:
    """Tell where the ranks are if one of these, the first of them first, ended without a word."""
    silent, positions = _silent(page, ended), page.positions()
    if not silent or not page.take():  # an error says more
        return
    rank = silent[0]
    now = time.monotonic()
    where = ", or on another node" if rank.nodes > 1 else ""
    others = ", ".join(str(other.rank) for other in silent[1:])
    also = (
        f"(as good as at once with rank {others}: a launcher ends the others when one dies, and "
        "it may have been any of them that did)\n"
        if others
        else ""
    )
    text = (
        f"hpcml: rank {rank.rank} (pid {rank.pid}, {rank.host}) has ended without a word: "
        f"killed by a signal, for want of memory, or by its MPI library{where}\n{also}"
        f"where the ranks of this node were:\n"
        f"{roll_call(positions, now, tuple(gone.rank for gone in silent))}\n"
    )
    data = text.encode()
    while data:
        data = data[os.write(2, data) :]
