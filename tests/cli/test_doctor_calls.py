"""The doctor tries every kind of call: one that crashes or hangs is a finding among others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest

from hpcml.cli.doctor import communication
from hpcml.cli.doctor.cells import COLLECTIVES, DTYPES, EXTRAS, Cell, plan
from hpcml.cli.doctor.communication import Result
from hpcml.comm import child
from hpcml.comm.algorithms import OPERATIONS
from hpcml.comm.child import PERMISSIVE, Ended, find_mpiexec

# The doctor's job with calls that misbehave on one rank.
TROUBLE = """
import os, signal, time
from hpcml.cli.doctor import trial

trial.LIMIT = 4.0
usual = trial._try

def trouble(axis, cell):
    if axis.rank == 1:
        if cell.operation == "reduce":
            os.kill(os.getpid(), signal.SIGSEGV)
        if cell.operation == "gather":
            time.sleep(100)
        if cell.operation == "scatter":
            raise RuntimeError("no luck")
    return usual(axis, cell)

trial._try = trouble
trial.main()
"""


@pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec")
def test_a_call_that_crashes_or_hangs_is_a_finding_and_the_rest_is_tried() -> None:
    jobs = []

    def start(left: Sequence[Cell]) -> Ended:
        jobs.append(list(left))
        program = [sys.executable, "-c", TROUBLE, json.dumps(left)]
        return child.start([find_mpiexec(), "-n", "2", *program], 60, PERMISSIVE)

    operations = ("allreduce", "reduce", "gather", "broadcast", "scatter", "alltoall")
    results = communication.survey(start, [Cell(name, "float32") for name in operations])
    assert {cell.operation: result.status for cell, result in results.items()} == {
        "allreduce": "ok",
        "reduce": "killed by SIGSEGV",
        "gather": "no answer within 0:00:04",
        "broadcast": "ok",
        "scatter": "RuntimeError: no luck",
        "alltoall": "ok",
    }
    # Each job goes on behind what ended the one before. (One that got no word out is tried again.)
    firsts = [job[0].operation for job in jobs]
    assert firsts[:3] == ["allreduce", "gather", "broadcast"]
    assert firsts[3:] in (["alltoall"], ["scatter", "alltoall"])


def test_jobs_that_do_not_start_are_not_started_again() -> None:
    jobs = []

    def start(left: Sequence[Cell]) -> Ended:
        jobs.append(left)
        return Ended("", "", "cannot start /nowhere/mpiexec")

    results = communication.survey(start, plan(device=False))
    assert len(jobs) == 1
    found = {result.status for result in results.values()}
    assert found == {"not tried (cannot start /nowhere/mpiexec)"}
    first, *others = communication.rows(results)
    assert first.status == "fail" and "cannot start" in first.value and first.remedy
    assert [row.status for row in others] == ["warn", "ok", "ok"]


def test_jobs_that_crash_come_to_an_end() -> None:
    def start(left: Sequence[Cell]) -> Ended:
        return Ended('{"began": 0}', "", "killed by SIGBUS")

    cells = plan(device=True)
    results = communication.survey(start, cells)
    assert list(results) == cells
    statuses = [result.status for result in results.values()]
    crashes = communication.CRASHES
    assert statuses[:crashes] == ["killed by SIGBUS"] * crashes
    assert set(statuses[crashes:]) == {f"not tried ({crashes} jobs have failed)"}


def test_lines_that_are_none_of_ours_are_passed_over() -> None:
    said = 'hello\n7\n{"began": 0}\n{"cell": 0, "found": ""}\n{"began": 1}\n{"cell": 1,'
    cells = [Cell("reduce", "int32"), Cell("gather", "int32")]
    assert communication.read(Ended(said, "", ""), cells) == {
        cells[0]: Result("ok"),
        cells[1]: Result("no result"),
    }


def test_every_kind_of_call_is_planned() -> None:
    host, device = plan(device=False), plan(device=True)
    assert set(COLLECTIVES) == set(OPERATIONS)
    assert len(set(host)) == len(host) and host[-len(EXTRAS) :] == list(EXTRAS)
    for operation in (*COLLECTIVES, "send"):
        for dtype in DTYPES:
            for form in ("blocking", "non-blocking"):
                assert Cell(operation, dtype, "host", form) in host
                assert Cell(operation, dtype, "device", form) in device


def test_what_works_is_short_and_what_fails_is_spelled_out() -> None:
    results = dict.fromkeys(plan(device=False), Result("ok"))
    results[EXTRAS[1]] = Result("ok", "right")
    results[EXTRAS[2]] = Result("ok", "unknown to it")
    rows = communication.rows(results)
    assert [row.status for row in rows] == ["ok"] * 4
    assert rows[3].value.startswith("float16: right, bfloat16: unknown to it")
    lines = communication.table(results)
    assert lines[0].split() == ["host", "memory", *DTYPES]
    assert lines[1].split() == ["allreduce", *["ok"] * len(DTYPES)]
    assert len(lines) == 1 + 9 + 1 + 8

    bad = Cell("reduce", "int64", "host", "non-blocking")
    results[bad] = Result("killed by SIGBUS")
    results[EXTRAS[0]] = Result("RuntimeError: wrong sums")
    results[Cell("allreduce", "float16", "shared")] = Result("ok", "/dev/shm has 1 MiB left")
    rows = communication.rows(results)
    assert [row.status for row in rows] == ["fail", "warn", "warn", "ok"]
    complaint = "reduce of int64, host memory, non-blocking: killed by SIGBUS"
    assert complaint in rows[0].value and rows[0].value.startswith("1 of ")
    assert rows[2].value == "/dev/shm has 1 MiB left" and "--shm-size" in rows[2].remedy
    lines = communication.table(results)
    assert lines[-1] == complaint
    assert lines[5].split() == ["reduce", *["ok"] * (len(DTYPES) - 1), "FAILS"]
    (found,) = [call for call in communication.plain(results) if call["status"] != "ok"][:1]
    assert found == {
        "operation": "reduce", "dtype": "int64", "memory": "host", "form": "non-blocking",
        "status": "killed by SIGBUS", "remark": "",
    }  # fmt: skip
