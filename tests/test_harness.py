"""The harness itself: each case is a small test file of its own, run as a job of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAD = """\
import ctypes, os, re, signal, time
import pytest
from mpi4py import MPI

comm = MPI.COMM_WORLD
pytestmark = pytest.mark.mpi

def test_before():
    comm.barrier()

"""

TAIL = """

def test_after():
    comm.barrier()
"""


class Outcome:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.text = done.stdout + done.stderr

    def stacks(self, rank: int) -> str:
        """What was printed of one rank."""
        found = re.search(rf"-+ rank {rank} -+\n(.*?)\n[-=]{{30}}", self.text, re.DOTALL)
        assert found, self.text
        return found[1]


def start(command: list[str]) -> Outcome:
    environ = os.environ | {"HPCML_TEST_LIMIT": "5", "PYTHONPATH": str(ROOT)}
    # No line cut; some launchers pass for terminals.
    environ |= {"COLUMNS": "300", "PY_COLORS": "0"}
    return Outcome(
        subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
    )


@pytest.fixture
def run(tmp_path: Path):
    """Write a test file of this body and run it, with a limit of 5 s and a grace of 1 s."""

    def run(body: str, *options: str, ranks: int = 3, head: str = HEAD, tail: str = TAIL):
        (tmp_path / "test_case.py").write_text(head + body + tail)
        command = [sys.executable, "-m", "tests.harness", "-n", str(ranks), *options]
        command += ["-c", str(ROOT / "setup.cfg"), "--rootdir", str(tmp_path), str(tmp_path)]
        command += ["-p", "tests.harness.plugin", "-o", "test_grace=1"]
        return start(command)

    return run


def line(text: str, body: str) -> int:
    """Number of the last line of the test file with this text."""
    return max(i for i, found in enumerate((HEAD + body).splitlines(), 1) if text in found)


FAILURES = """
def test_odd():
    print("words of rank", comm.rank)
    assert comm.rank != 1, "rank one is odd"

def test_all():
    assert comm.rank < 0, "negative"

def test_skipped_by_one():
    if comm.rank == 2: pytest.skip("not here")

@pytest.fixture
def broken_before():
    if comm.rank == 1: raise RuntimeError("broken set-up")

@pytest.fixture
def broken_after():
    yield
    if comm.rank == 1: raise RuntimeError("broken teardown")

def test_before_it(broken_before):
    comm.barrier()

def test_after_it(broken_after):
    comm.barrier()
"""


def test_failures_are_told_and_the_run_goes_on(run):
    """On some ranks, on all of them, a skip of one, and in the fixtures of one."""
    outcome = run(FAILURES)
    assert outcome.code == 1
    assert "3 failed, 3 passed, 2 errors" in outcome.text, outcome.text
    assert "AssertionError: rank one is odd" in outcome.text
    assert "words of rank 1" in outcome.text
    assert "ranks 0, 2 - " in outcome.text, "who has passed"
    assert re.search("FAILED .*test_odd - rank 1: AssertionError: rank one", outcome.text)
    assert "ranks 0, 1, 2 - " in outcome.text
    assert outcome.text.count("E       AssertionError: negative") == 1, "told once"
    assert "skipped on 1 of 3 ranks only" in outcome.text
    for word, test in (("set-up", "test_before_it"), ("teardown", "test_after_it")):
        assert re.search(f"ERROR .*{test} - rank 1: RuntimeError: broken {word}", outcome.text)


def test_skip_on_all_ranks_is_a_skip(run):
    outcome = run("@pytest.mark.mpi(min_size=4)\ndef test_skip():\n    assert False\n")
    assert outcome.code == 0, outcome.text
    assert "2 passed, 1 skipped" in outcome.text
    assert outcome.text.count("test session starts") == 1, "other ranks than 0 are quiet"


def test_hang_ends_with_the_stacks_of_all_ranks(run):
    body = """
@pytest.mark.limit(1)
def test_hang():
    if comm.rank == 2:
        time.sleep(1000)
    comm.barrier()
"""
    outcome = run(body)
    assert outcome.code != 0
    assert "test_hang exceeded its limit of 1 s" in outcome.text
    assert f"line {line('time.sleep(1000)', body)} in test_hang" in outcome.stacks(2)
    for rank in (0, 1):
        assert f"line {line('comm.barrier()', body)} in test_hang" in outcome.stacks(rank)
    assert "passed" not in outcome.text


def test_hang_with_the_interpreter_locked(run):
    body = """
@pytest.mark.limit(1)
def test_hang():
    if comm.rank == 1:
        re.match("(a+)+$", "a" * 99 + "b")
    comm.barrier()
"""
    outcome = run(body)
    assert outcome.code != 0
    assert f"line {line('re.match', body)} in test_hang" in outcome.stacks(1)


def test_hang_that_ends_after_all(run):
    """The run has failed, even if the reporting wakes up what it reports on."""
    body = """
@pytest.mark.limit(1)
def test_hang():
    ctypes.CDLL(None).sleep(1000)
"""
    outcome = run(body, ranks=2)
    assert outcome.code != 0
    assert "test_hang exceeded its limit of 1 s" in outcome.text


def test_failure_before_a_collective_ends_the_run_after_the_grace(run):
    body = """
@pytest.mark.limit(50)
def test_early():
    assert comm.rank != 1, "before the barrier"
    comm.barrier()
"""
    outcome = run(body)
    assert outcome.code != 0
    assert "rank 1 has failed, and not all others have finished" in outcome.text
    assert "AssertionError: before the barrier" in outcome.stacks(1)
    assert "in test_early" in outcome.stacks(0)
    assert "in test_early" in outcome.stacks(2)


@pytest.mark.parametrize(
    ("death", "told"),
    [
        ("os._exit(0)", "with status 0"),
        ("ctypes.string_at(0)", "by SIGSEGV"),
    ],
)
def test_death_of_a_rank_ends_the_run_at_once(run, death, told):
    body = "@pytest.mark.limit(50)\ndef test_death():\n    comm.barrier()\n"
    body += f"    if comm.rank == 1: {death}\n    comm.barrier()\n"
    outcome = run(body)
    assert outcome.code != 0
    assert f"rank 1 ended {told} in test_case.py::test_death" in outcome.text
    assert "the process is gone" in outcome.stacks(1)
    assert "in test_death" in outcome.stacks(0)


def test_ranks_that_collect_different_tests(run):
    outcome = run("if comm.rank == 1:\n    raise ImportError('no such thing on rank 1')\n")
    assert outcome.code != 0
    assert "ranks have collected different tests" in outcome.text
    assert "ImportError: no such thing on rank 1" in outcome.text


def test_no_test_is_a_failure(run):
    assert run("", "-k", "nothing_of_this_name", ranks=0, head="").code == 5


def test_the_run_as_a_whole_has_a_limit(run):
    body = "import sys\nif comm.rank == 1:\n    time.sleep(1000)\n"
    outcome = run(body, "--limit", "4", ranks=2)
    assert outcome.code == 1
    assert "the run exceeded its limit of 4 s" in outcome.text
    assert f"line {line('time.sleep(1000)', body)} in <module>" in outcome.stacks(1)


def test_serial_hang(run):
    head = "import time, pytest\n"
    outcome = run(
        "@pytest.mark.limit(1)\ndef test_s():\n    time.sleep(99)\n", ranks=0, head=head, tail=""
    )
    assert outcome.code == 1
    assert "test_s exceeded its limit of 1 s" in outcome.text
    assert "line 4 in test_s" in outcome.text


APART = """\
import os, pathlib, subprocess, time
import pytest

@pytest.mark.limit(50)
def test_both_processes_have_begun():
    here = pathlib.Path(__file__)
    here.with_suffix(".begun").touch()
    while len(list(here.parent.glob("*.begun"))) < 2:
        time.sleep(0.05)

"""


@pytest.fixture
def shared(tmp_path: Path):
    """Write test files of these bodies and have two processes share them, one at least each."""

    def run(*bodies: str):
        for number, body in enumerate(bodies):
            (tmp_path / f"test_{number}.py").write_text(APART + body)
        command = [sys.executable, "-m", "tests.harness", "-j", "2", "-c", str(ROOT / "setup.cfg")]
        command += ["--rootdir", str(tmp_path), "-p", "tests.harness.plugin", str(tmp_path)]
        return start(command)

    return run


def test_processes_share_the_files_and_tell_all_failures(shared, tmp_path):
    body = """
@pytest.mark.parametrize("number", range(3))
def test(number, request):
    with pathlib.Path("{log}").open("a") as log:
        print(request.node.nodeid, file=log)
"""
    fails = "def test_odd():\n    assert not 'words of {}'\n"
    log = tmp_path / "log"
    body = body.format(log=log)
    outcome = shared(body + fails.format("zero"), body + fails.format("one"), *[body] * 3)
    assert outcome.code == 1
    expected = [f"test_{file}.py::test[{number}]" for file in range(5) for number in range(3)]
    assert sorted(log.read_text().splitlines()) == expected, "each test once"
    counts = [int(count) for count in re.findall(r"1 failed, (\d+) passed", outcome.text)]
    assert len(counts) == 2 and sum(counts) == 20 and min(counts) >= 4, outcome.text
    assert "words of zero" in outcome.text and "words of one" in outcome.text


def test_a_hang_in_one_of_the_processes_ends_all_and_what_they_have_started(shared, tmp_path):
    job = tmp_path / "job"
    body = f"""
@pytest.mark.limit(2)
def test_hang():
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    pathlib.Path("{job}").write_text(str(process.pid))
    time.sleep(1000)
"""
    outcome = shared(body, "def test_other():\n    time.sleep(1000)\n")
    assert outcome.code == 1
    assert "test_hang exceeded its limit of 2 s" in outcome.text
    assert "in test_hang" in outcome.text and "in test_other" in outcome.text
    with pytest.raises(ProcessLookupError):
        os.kill(int(job.read_text()), 0)


def test_the_death_of_one_of_the_processes_ends_all(shared):
    outcome = shared("def test_death():\n    os._exit(0)\n", "def test_b():\n    pass\n")
    assert outcome.code == 1
    assert "ended with status 0 in test_0.py::test_death" in outcome.text


def test_interrupts_are_heard_by_a_run_in_the_background(run):
    """A shell starts it deaf to them."""
    body = """
def test_interrupt():
    with pytest.raises(KeyboardInterrupt):
        _thread.interrupt_main()
        time.sleep(1)
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = run(body, ranks=0, head="import _thread, pytest, time\n", tail="")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.code == 0, outcome.text


def test_under_mpiexec_alone(tmp_path):
    """Without the outer command: a failure and a hang are handled by the plugin alone."""
    body = "def test_odd():\n    assert comm.rank != 1\n"
    body += "@pytest.mark.limit(1)\ndef test_hang():\n"
    body += "    if comm.rank == 0: time.sleep(99)\n    comm.barrier()\n"
    (tmp_path / "test_case.py").write_text(HEAD + body)
    mpiexec = Path(sys.executable).parent / "mpiexec"
    command = [str(mpiexec), "-n", "2", sys.executable, "-m", "pytest", "--with-mpi"]
    command += ["-c", str(ROOT / "setup.cfg"), "--rootdir", str(tmp_path), str(tmp_path)]
    command += ["-p", "tests.harness.plugin", "-p", "no:cacheprovider"]
    outcome = start(command)
    assert outcome.code != 0
    assert "test_case.py .F" in outcome.text
    assert f"line {line('time.sleep(99)', body)} in test_hang" in outcome.stacks(0)
    assert "in test_hang" in outcome.stacks(1)
