"""Two hosts made of this machine: the script that makes them, and what crosses the link there.

Where the script cannot make hosts (no root, no iproute2, another MPI) it says why, and so do the
tests that are skipped.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.comm.jobs import ROOT, child_environment

SCRIPT = str(ROOT / "scripts" / "two_hosts.sh")
PYTHON_FIRST = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Two calls of a collective: what each rank sent by the ledger, what its interface counted.
TRAFFIC = """
import json, sys, time
import numpy as np
import hpcml

def counters():
    (line,) = [line for line in open("/proc/net/dev") if "link0:" in line]
    fields = line.split()
    return np.array([int(fields[9]), int(fields[1])])

operation, algorithm, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
mesh = hpcml.Mesh()
axis = mesh["dp"]
x = np.full(nbytes // 4, axis.rank + 1.0, np.float32)
axis.barrier()
before = counters()  # while nobody sends yet
axis.barrier()
earlier, start = mesh.ledger.snapshot(), time.perf_counter()
for _ in range(2):
    getattr(axis, operation)(x, out=x, algorithm=algorithm)
seconds = time.perf_counter() - start
count = (mesh.ledger.snapshot() - earlier)["dp"]
off_node = sum(c.bytes_off_node for c in count.values())
axis.barrier()
sent, received = (counters() - before).tolist()
rows = axis.allgather_object([mesh.node.index, off_node, sent, received, seconds, float(x[-1])])
if axis.rank == 0:
    print(json.dumps(rows))
"""


def start(*command: str, options: tuple[str, ...] = (), **environ: str) -> subprocess.Popen[str]:
    environment = child_environment(PATH=PYTHON_FIRST) | environ
    return subprocess.Popen(
        [SCRIPT, *options, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a process, which is ended if it does not end by itself."""
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the script hangs: {process.communicate()}")
    return process.returncode, output, errors


def run(*command: str, options: tuple[str, ...] = (), **environ: str) -> tuple[int, str, str]:
    return finished(start(*command, options=options, **environ))


@functools.cache
def why_not() -> str:
    """Why there are no two hosts here, or an empty string."""
    code, _, errors = run("true")
    return errors.strip() if code == 77 else ""


@pytest.fixture
def two_hosts() -> None:
    if why_not():
        pytest.skip(why_not())


def left_over(pid: int) -> list[str]:
    """Namespaces of a run that are still there."""
    known = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return re.findall(rf"\bhpcml-{pid}-\d", known.stdout)


def traffic(operation: str, algorithm: str, nbytes: int, *options: str) -> list[dict[str, Any]]:
    """What two calls put on the link, by host: ledger, counters each way, seconds, results."""
    arguments = (operation, algorithm, str(nbytes))
    code, output, errors = run(sys.executable, "-c", TRAFFIC, *arguments, options=options)
    assert code == 0, errors
    rows = json.loads(output)
    hosts = []
    for index in range(2):
        ranks = [row[1:] for row in rows if row[0] == index]
        assert ranks, f"no rank on node {index}: {rows}"
        ledger, sent, received, seconds, last = zip(*ranks, strict=True)
        hosts.append(
            {"ranks": len(ranks), "ledger": sum(ledger), "sent": max(sent),
             "received": max(received), "seconds": max(seconds), "last": set(last)}
        )  # fmt: skip
    return hosts


@pytest.mark.usefixtures("two_hosts")
def test_a_message_takes_the_link_and_the_ledger_says_so() -> None:
    n = 1 << 20
    first, second = traffic("broadcast", "binomial", n, "--rate", "100mbit")
    assert first["ranks"] == second["ranks"] == 1 and first["last"] == second["last"] == {1.0}
    assert (first["ledger"], second["ledger"]) == (2 * n, 0)
    assert 2 * n < first["sent"] <= 2.1 * n and 2 * n < second["received"] <= 2.1 * n
    assert second["sent"] < 0.1 * n
    # 2 MiB at 100 Mbit/s take 0.17 s, however fast the machine.
    assert second["seconds"] > 0.1


@pytest.mark.usefixtures("two_hosts")
def test_a_hierarchical_all_reduce_sends_the_buffer_once_each_way() -> None:
    n = 4 << 20
    for host in traffic("allreduce", "hierarchical", n, "--ranks", "2"):
        assert host["ranks"] == 2
        assert host["last"] == {40.0}
        assert host["ledger"] == 2 * n
        assert 2 * n < host["sent"] <= 2.1 * n and 2 * n < host["received"] <= 2.1 * n


@pytest.mark.usefixtures("two_hosts")
def test_the_status_of_the_command_and_what_was_sent_are_told() -> None:
    process = start("bash", "-c", "exit 7")
    code, output, errors = finished(process)
    assert (code, output) == (7, "")
    assert re.search(r"two_hosts.sh: host 1 sent \d+ bytes, host 2 sent \d+ bytes\n$", errors)
    assert left_over(process.pid) == []


@pytest.mark.usefixtures("two_hosts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_when_the_script_is_killed(number: signal.Signals) -> None:
    """Not even where the command ignores requests to end."""
    process = start("bash", "-c", "trap '' INT TERM; echo $$; sleep 100; sleep 100")
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert len(left_over(process.pid)) == 2
    process.send_signal(number)
    code, _, _ = finished(process)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    end = time.monotonic() + 20
    while left_over(process.pid) or any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "namespaces or processes are left"
        time.sleep(0.1)


@pytest.mark.usefixtures("two_hosts")
def test_two_runs_do_not_meet() -> None:
    processes = [start("bash", "-c", f"sleep 1; echo {name}") for name in "ab"]
    outcomes = [finished(process)[:2] for process in processes]
    assert outcomes == [(0, "a\na\n"), (0, "b\nb\n")]


@pytest.mark.usefixtures("two_hosts")
def test_a_rate_that_tc_does_not_know() -> None:
    process = start("true", options=("--rate", "fast"))
    code, _, errors = finished(process)
    assert code == 77 and errors.count("\n") == 1 and "--rate 'fast'" in errors
    assert left_over(process.pid) == []


def test_without_root_one_line_says_so() -> None:
    lower = ["setpriv", "--reuid", "65534"] if os.geteuid() == 0 else []
    if lower and not shutil.which("setpriv"):
        pytest.skip("root without setpriv cannot become another user")
    done = subprocess.run(
        [*lower, SCRIPT, "true"], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == (
        "two_hosts.sh: two hosts need root, for network namespaces: run it as root\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no command"),
        (["--ranks"], "--ranks needs a value"),
        (["--ranks", "0", "true"], "--ranks '0' is not a number of ranks"),
        (["--speed", "1", "true"], "unknown option '--speed'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], complaint: str) -> None:
    code, output, errors = run(*arguments)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert complaint in errors
