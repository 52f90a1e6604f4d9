"""Ranks that wait in vain, are stopped or killed: each job must end, and name rank and line.

Each is a job of its own. And the records this rests on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml.comm import sheet, watch
from hpcml.comm.board import Group
from hpcml.comm.noted import NodeBoard
from hpcml.comm.rollcall import conclusion, roll_call
from hpcml.comm.sheet import LEFT, Sheet, ranks_of, spell
from hpcml.errors import UserError
from tests.comm.jobs import Job

LIMIT = 30
"""Seconds that a job may take; without the watch all of them would hang."""

PREAMBLE = """
import os, signal, sys, threading, time
import numpy as np
from hpcml.comm import Mesh
mesh = Mesh()
dp = mesh["dp"]
first = dp.allreduce(np.ones(5, np.float32))
"""
LINE = PREAMBLE.count("\n") + 1
"""Number of the first line that a test adds."""


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=LIMIT)[0]
    return process.returncode, output


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ("time.sleep(100)", f"computing for S s at <string>:{LINE}, last call allreduce #1 on dp"),
        ("sys.exit()", "at the end of its program, last call allreduce #1 on dp (ranks 0-2), "),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped, computing for S s"),
    ],
    ids=["computes", "has ended", "is stopped"],
)
def test_a_rank_that_does_not_come_is_named(job: Job, action: str, what: str) -> None:
    program = PREAMBLE + f"if mesh.rank == 1: {action}\ndp.barrier()\n"
    code, output = ended(job(3, program, HPCML_TIMEOUT="2"))
    assert code not in (0, None)
    assert output.count("hpcml: rank ") == 1 and "(HPCML_TIMEOUT=2) in barrier #2" in output
    missing = next(line for line in output.splitlines() if line.startswith("missing: "))
    before, _, after = what.partition("S s")
    assert missing.startswith(f"missing: rank 1, {before}") and after in missing
    assert f"5 float32, at <string>:{LINE - 1}" in missing
    rows = [line for line in output.splitlines() if line.startswith("  rank ")]
    assert [row.split()[1] for row in rows] == ["0", "1", "2"]
    assert all(
        f"in barrier #2 on dp (ranks 0-2), at <string>:{LINE + 1}" in rows[r] for r in (0, 2)
    )


def test_a_message_that_is_never_sent(job: Job) -> None:
    program = PREAMBLE + "dp.recv(np.ones(3), 1) if mesh.rank == 0 else time.sleep(100)\n"
    code, output = ended(job(2, program, HPCML_TIMEOUT="2"))
    assert code not in (0, None)
    assert f"in recv with rank 1 on dp, 3 float64, at <string>:{LINE}\n" in output
    assert "missing: rank 1, computing for" in output


def test_a_wait_in_the_background_is_at_the_line_that_started_it(job: Job) -> None:
    program = PREAMBLE + (
        "dp.iallreduce(np.ones(7)).wait()\nif mesh.rank: time.sleep(100)\n"
        "request = dp.iallreduce(np.ones(7))\nrequest.wait()\n"
    )
    code, output = ended(job(2, program, HPCML_TIMEOUT="2"))
    assert code not in (0, None)
    call = "in allreduce #2 on dp in the background (ranks 0-1), 7 float64, at <string>:"
    assert f"{call}{LINE + 2}\n" in output and "missing: rank 1, computing for" in output


@pytest.mark.parametrize(
    "action", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(7)"], ids=["killed", "left"]
)
def test_the_last_positions_are_told_when_a_rank_dies(job: Job, action: str) -> None:
    program = PREAMBLE + f"if mesh.rank == 1:\n    time.sleep(0.5)\n    {action}\ndp.barrier()\n"
    code, output = ended(job(3, program))
    assert code not in (0, None)
    assert output.count("has ended without a word") == 1
    first = output.index("hpcml: rank ")
    assert "rank 1" in output[first : output.index("where the ranks of this node were")]
    rows = [line for line in output.splitlines() if line.startswith("  rank ")]
    row = re.sub(r"for 0\.[5-9] s", "for a while", rows[1])
    assert f"gone, computing for a while at <string>:{LINE + 1}" in row or (
        f"gone, computing for a while, last call allreduce #1 on dp (ranks 0-2), 5 float32, "
        f"at <string>:{LINE - 1}" in row
    )
    assert f"in barrier #2 on dp (ranks 0-2), at <string>:{LINE + 3}" in rows[0]


def test_a_slow_rank_raises_no_alarm(job: Job) -> None:
    program = PREAMBLE + "if mesh.rank == 1: time.sleep(2)\ndp.barrier()\n"
    assert ended(job(2, program, HPCML_TIMEOUT="10")) == (0, "")


def test_a_job_that_was_stopped_as_a_whole_goes_on(job: Job) -> None:
    program = PREAMBLE + (
        "print(*dp.allgather_object(os.getpid()), flush=True) if mesh.rank == 0 else "
        "dp.allgather_object(os.getpid())\nif mesh.rank: time.sleep(1.2)\ndp.barrier()\n"
    )
    process = job(2, program, HPCML_TIMEOUT="2")
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert ended(process) == (0, "")


def test_an_end_by_ones_own_will_needs_no_roll_call(job: Job) -> None:
    code, output = ended(job(2, PREAMBLE + "sys.exit(3)"))
    assert code == 3 and "hpcml" not in output


def test_the_limit() -> None:
    def read(text: str) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPCML_TIMEOUT", text)
            return watch.limit()

    assert (read("12.5"), read(""), read("0")) == (12.5, 300, float("inf"))
    for bad in ("soon", "-1", "nan"):
        with pytest.raises(UserError, match=rf"^HPCML_TIMEOUT='{bad}' is no number of seconds.*$"):
            read(bad)


def test_a_bad_limit_is_refused_once(job: Job) -> None:
    program = """
import sys
from hpcml.comm import Mesh, guard
from hpcml.errors import UserError
try:
    Mesh()
except UserError as error:
    sys.exit(guard.refuse(error))
"""
    code, output = ended(job(2, program, HPCML_TIMEOUT="soon"))
    assert code == 2 and output.startswith("hpcml: error: HPCML_TIMEOUT='soon' is no number")
    assert output.count("hpcml") == 1


# Ranks on one sheet, within this process

DP = Group("dp", (0, 1, 2))


def boards(count: int = 3, nodes: int = 1) -> list[NodeBoard]:
    page = Sheet.private(count)
    return [NodeBoard(page, rank, rank, nodes) for rank in range(count)]


def verdict(ranks: list[NodeBoard], rank: int = 0) -> str:
    call = ranks[rank].waiting()
    assert call is not None
    return conclusion(rank, call, ranks[0].sheet.positions(), time.monotonic())


def test_a_position_is_read_as_it_was_written() -> None:
    ranks = boards()

    def operation() -> None:
        ranks[1].enter("allreduce", DP, 7, 3_000_000_000, "bfloat16")

    operation()
    here = f"{__file__}:{sys._getframe().f_lineno - 1}"
    position = ranks[0].sheet.positions()[1]
    (call,) = position.inside
    assert (call.operation, call.sequence, call.elements) == ("allreduce", 7, 3_000_000_000)
    assert (call.axis, call.members, call.dtype) == ("dp", "0-2", "bfloat16")
    assert position.pid == os.getpid() and 0 <= time.monotonic() - call.since < 60
    assert call.place == here
    ranks[1].leave()
    assert ranks[0].sheet.positions()[1].inside == [] and ranks[1].waiting() is None


def test_a_call_at_the_beginning_of_a_block_is_at_the_line_of_the_block() -> None:
    """It was at the line of contextlib that begins all blocks."""
    board = boards()[0]

    @contextmanager
    def block() -> Iterator[None]:
        board.enter("barrier", DP, 1, 0, "uint8")
        yield

    with block():
        here = f"{__file__}:{sys._getframe().f_lineno - 1}"
    (call,) = board.sheet.position(0).inside
    assert call.place == here


def test_threads_of_a_rank_have_places_of_their_own() -> None:
    board = boards()[0]
    board.enter("barrier", DP, 1, 0, "uint8")
    thread = threading.Thread(target=board.enter, args=("allreduce", DP, 2, 1, "int8"))
    thread.start()
    thread.join()
    assert [call.operation for call in board.sheet.position(0).inside] == ["barrier", "allreduce"]
    board.leave()
    assert [call.operation for call in board.sheet.position(0).inside] == ["allreduce"]


def test_what_is_concluded() -> None:
    ranks = boards()
    for board in ranks[:2]:
        board.enter("allreduce", DP, 4, 10, "float32")
    assert verdict(ranks).startswith("missing: rank 2, computing for ")
    assert verdict(ranks).endswith("no call yet")
    ranks[2].mark(sheet.LEFT)
    assert verdict(ranks) == "missing: rank 2, at the end of its program, no call yet"
    ranks[2].enter("allreduce", DP, 4, 11, "float32")
    different = "not the same call: ranks 0-1 allreduce of 10 float32; rank 2 allreduce of 11"
    assert verdict(ranks).startswith(different)
    ranks[2].leave()
    assert verdict(ranks).startswith("through with call #4 of this axis already: rank 2\n")
    far = Group("dp", (0, 1, 4, 6, 8))
    for board in ranks[:2]:
        board.enter("barrier", far, 1, 0, "uint8")
    assert verdict(ranks) == "on other nodes, of which this one knows nothing: ranks 4-8:2"


def test_a_half_written_record_is_read_all_the_same() -> None:
    ranks = boards()
    ranks[0].enter("allreduce", DP, 4, 10, "float32")
    memory = ranks[0].sheet.memory
    for size in range(32, 480, 7):
        at = sheet.call_of(0, 0) + size
        memory[at : at + 7] = b"\xff\t\xc3,-:9"
        positions = ranks[0].sheet.positions()
        assert roll_call(positions, 1.0).count("\n") == 2
        assert conclusion(0, positions[0].calls[0], positions, 1.0)


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=40))
def test_ranks_in_few_characters(ranks: set[int]) -> None:
    assert ranks_of(spell(tuple(sorted(ranks)))) == sorted(ranks)


def test_usual_groups_of_ranks_are_short() -> None:
    assert spell(tuple(range(1024))) == "0-1023"
    assert spell(tuple(range(3, 4000, 8))) == "3-3995:8"
    assert spell((5,)) == "5" and spell((0, 4)) == "0, 4" and spell((2, 1)) == "2, 1"


def test_who_tells_how_the_job_ends_is_asked_once() -> None:
    page = boards()[0].sheet
    assert not page.told()
    assert (page.take(), page.take(), page.told()) == (True, False, True)


def test_looking_at_a_rank_that_computes_does_no_harm() -> None:
    """The watch once walked the frames of the running main thread, which crashed the process."""
    board = NodeBoard(Sheet.private(1), 0, 0, 1)
    # No event: the last look could find the main thread in the code of that.
    begun: list[bool] = []
    looked: list[bool] = []

    def look() -> None:
        while not begun:
            time.sleep(0.001)
        for _ in range(500):
            board.look()
        looked.append(True)

    def deep(count: int) -> int:
        return 1 + deep(count - 1) if count else 0

    threading.Thread(target=look, daemon=True).start()
    begun.append(True)
    while not looked:
        assert deep(30) == 30
    assert f"{__file__}:" in board.sheet.position(0).line
    board.mark(LEFT)
