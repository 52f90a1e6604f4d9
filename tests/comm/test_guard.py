"""Crashes, refusals and interrupts that concern all ranks: each in a job of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpcml.comm import Axis, Mesh
from hpcml.comm.guard import StopFlag, agree, leave, refuse
from hpcml.errors import NonFiniteError, UserError
from tests.comm.jobs import Job

LIMIT = 120  # with cold caches every rank compiles the package first
"""Seconds that a job may take on a busy machine; all of them would hang for ever without guard."""

PREAMBLE = """
import os, sys, threading, time
import numpy as np
from hpcml.comm import Mesh, guard
from hpcml.errors import NonFiniteError, UserError
mesh = Mesh()
def wait():
    mesh.world.barrier()
"""


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=LIMIT)[0]
    return process.returncode, output


def test_a_crash_on_one_rank_ends_the_job_with_its_traceback(job: Job) -> None:
    code, output = ended(
        job(3, PREAMBLE + "if mesh.rank == 1: raise RuntimeError('boom 17')\nwait()")
    )
    assert code == 1
    assert output.count("RuntimeError: boom 17") == 1 and output.count("Traceback") == 1
    assert "rank 1 (" in output and "failed and ends the job" in output


def test_the_same_crash_on_all_ranks_is_told_once(job: Job, tmp_path: Path) -> None:
    program = PREAMBLE + "raise RuntimeError('boom 17')"
    code, output = ended(job(4, program, TMPDIR=str(tmp_path)))
    assert code == 1
    assert output.count("RuntimeError: boom 17") == 1 and output.count("Traceback") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_a_thread_ends_the_job(job: Job) -> None:
    program = "if mesh.rank == 1: threading.Thread(target=lambda: 1 / 0, name='reader').start()"
    code, output = ended(job(2, PREAMBLE + program + "\nwait()"))
    assert code == 1
    assert output.count("ZeroDivisionError") == 1 and "in thread reader failed" in output


def test_a_thread_may_exit(job: Job) -> None:
    program = "t = threading.Thread(target=sys.exit); t.start(); t.join(); wait()"
    assert ended(job(2, PREAMBLE + program)) == (0, "")


def test_the_exit_code_of_a_users_error_survives_the_hook(job: Job) -> None:
    program = "if mesh.rank == 1: raise NonFiniteError('loss')\nwait()"
    code, output = ended(job(2, PREAMBLE + program))
    assert code == 3 and output.count("NonFiniteError: loss") == 1


REFUSE = """
def work():
    if {condition}:
        raise UserError("mesh.dp=3: " + {message})
    return mesh.rank
try:
    assert {agreed}
except UserError as error:
    sys.exit(guard.refuse(error))
wait()
"""


@pytest.mark.parametrize(
    ("condition", "message", "agreed", "line"),
    [
        ("True", "'no'", "guard.agree(mesh.world, work) is None", "mesh.dp=3: no"),
        ("mesh.rank", "'no'", "guard.agree(mesh.world, work) is None", "rank 1: mesh.dp=3: no"),
        ("True", "'no'", "work() is None", "mesh.dp=3: no"),
    ],
)
def test_a_refusal_is_one_line_and_code_2(
    job: Job, condition: str, message: str, agreed: str, line: str
) -> None:
    program = REFUSE.format(condition=condition, message=message, agreed=agreed)
    assert ended(job(2, PREAMBLE + program)) == (2, f"hpcml: error: {line}\n")


def test_a_refusal_on_one_rank_alone_ends_the_others(job: Job) -> None:
    program = REFUSE.format(condition="mesh.rank == 1", message="'no'", agreed="work() != 1")
    begin = time.monotonic()
    code, output = ended(job(3, PREAMBLE + program))
    assert code == 2 and output.startswith("hpcml: error: mesh.dp=3: no\n")
    assert time.monotonic() - begin > 4  # the others had their time to follow


def test_a_refusal_before_there_is_a_mesh_is_told_by_the_first_rank(job: Job) -> None:
    program = """
import sys
from hpcml.comm import guard
from hpcml.errors import UserError
sys.exit(guard.refuse(UserError("bad key")))
"""
    assert ended(job(2, program)) == (2, "hpcml: error: bad key\n")


def test_a_refusal_on_one_rank_before_there_is_a_mesh_ends_the_others(job: Job) -> None:
    program = """
import sys
from hpcml.comm import Mesh, guard
from hpcml.comm.launch import read
from hpcml.errors import UserError
if read().rank == 1:
    sys.exit(guard.refuse(UserError("bad key")))
Mesh().world.barrier()
"""
    code, output = ended(job(2, program))
    assert code == 2 and output.startswith("hpcml: error: bad key\n")


def test_copies_that_are_no_world_are_refused_once(job: Job) -> None:
    program = """
import sys
from hpcml.comm import Mesh, guard
from hpcml.errors import UserError
try:
    Mesh()
except UserError as error:
    sys.exit(guard.refuse(error))
"""
    copies = [job(0, program, SLURM_NTASKS="2", SLURM_PROCID=str(rank)) for rank in (0, 1)]
    (first, said), (second, nothing) = (ended(copy) for copy in copies)
    assert (first, second, nothing) == (2, 2, "")
    assert said.startswith("hpcml: error: SLURM_NTASKS=2, but the MPI world has 1 rank")
    assert said.count("\n") == 1


def test_agreement(axis: Axis) -> None:
    assert agree(axis, lambda: axis.rank) == axis.rank

    def fail_alike() -> None:
        raise NonFiniteError("loss=nan")

    with pytest.raises(NonFiniteError, match=r"^loss=nan$"):
        agree(axis, fail_alike)

    def fail_above(rank: int) -> None:
        if axis.rank >= rank:
            raise UserError(f"file {axis.rank}")

    if axis.size > 1:
        with pytest.raises(UserError, match=r"^rank 1: file 1$"):
            agree(axis, lambda: fail_above(1))
        with pytest.raises(UserError, match=r"^rank 0: file 0$"):
            agree(axis, lambda: fail_above(0))
    axis.barrier()


def test_alone_there_is_nobody_to_wait_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delenv("PMI_RANK", raising=False)
    assert (leave(0), leave(2)) == (0, 2)
    assert refuse(NonFiniteError("loss=nan at step 3")) == 3
    assert capsys.readouterr().err == "hpcml: error: loss=nan at step 3\n"


def test_the_stop_flag_alone() -> None:
    axis = Axis("dp")
    before = signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        assert not stop.agreed(axis)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and stop.agreed(axis)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.mpi(min_size=2)
def test_one_rank_that_is_asked_to_stop_stops_all() -> None:
    axis = Mesh()["dp"]
    with StopFlag() as stop:
        assert not stop.agreed(axis)
        if axis.rank == axis.size - 1:
            signal.raise_signal(signal.SIGINT)
        assert stop.agreed(axis)
        assert (stop.signal is None) == (axis.rank < axis.size - 1)
    assert axis.allreduce(np.ones(1)) == axis.size


STEPS = """
with guard.StopFlag() as stop:
    for step in range(100000):
        if step == 1 and mesh.rank == 0:
            print("stepping", flush=True)
        time.sleep(0.01)
        if stop.agreed(mesh.world):
            time.sleep(2)  # writing what is left to write
            mesh.world.barrier()
            break
if mesh.rank == 0:
    print("ended cleanly", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_mpiexec_ends_the_loop_on_all_ranks(job: Job, number: int) -> None:
    process = job(2, PREAMBLE + STEPS)
    assert process.stdout is not None
    assert process.stdout.readline() == "stepping\n"
    process.send_signal(number)
    code, output = ended(process)
    assert code == 0 and "ended cleanly\n" in output and "Traceback" not in output


def test_an_interrupt_outside_the_loop_ends_the_job_without_a_traceback(job: Job) -> None:
    program = "if mesh.rank == 0: print('waiting', flush=True)\ntime.sleep(1000)"
    process = job(2, PREAMBLE + program)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    code, output = ended(process)
    assert code == 130 and output.count("interrupted") == 1 and "Traceback" not in output
