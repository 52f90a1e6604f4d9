"""Which way messages of a GPU's arrays take: what is asked for, what a trial finds, who decides."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from hpcml.comm import Mesh, child, direct, run
from hpcml.comm.child import PERMISSIVE, Outcome, find_mpiexec
from hpcml.comm.launch import APART
from hpcml.comm.link import Link
from hpcml.comm.world import world
from hpcml.errors import UserError


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been asked for or found out."""
    monkeypatch.delenv(direct.VARIABLE, raising=False)
    monkeypatch.setattr(direct._Known, "verdict", direct._UNKNOWN)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Outcome]]:
    """What trials find, each of which takes the last of these."""
    found: list[Outcome] = []
    monkeypatch.setattr(direct, "probe", found.pop)
    yield found
    assert not found, "a trial that nobody made"


def settled(*wishes: str) -> list[bool]:
    """What ranks that are threads, but taken for processes, agree on."""

    def program() -> bool:
        transport = world()
        transport.processes = True
        link = Link(transport)
        link._gpu = wishes[link.rank]
        link.settle()
        assert link.take_counts() == (0, 0)
        return link.direct

    return run(program, ranks=len(wishes), timeout=30)


@pytest.mark.parametrize("works", [True, False])
def test_one_trial_tells_all_ranks(
    works: bool, trials: list[Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    trials.append(Outcome({"devices": [0, 0]}) if works else Outcome(failure="killed by SIGSEGV"))
    with caplog.at_level(logging.WARNING, "hpcml"):
        assert settled("auto", "auto", "auto") == [works] * 3
        assert settled("auto", "auto") == [works] * 2  # known by now
    said = ["MPI does not take memory of the GPU (killed by SIGSEGV)"] * (not works)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == said


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        (("device", "device"), True),
        (("staged", "staged"), False),
        (("device", "staged", "auto"), False),
    ],
)
def test_what_is_asked_for_needs_no_trial(wishes: tuple[str, ...], expected: bool) -> None:
    assert settled(*wishes) == [expected] * len(wishes)


def test_a_rank_that_does_not_know_has_it_tried(trials: list[Outcome]) -> None:
    trials.append(Outcome({"devices": [0, 1]}))
    assert settled("device", "auto") == [True, True]


def test_threads_have_no_mpi_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(lambda: Mesh().world.takes_gpu_memory, ranks=2) == [True, True]
    monkeypatch.setenv(direct.VARIABLE, "staged")
    assert run(lambda: Mesh().world.takes_gpu_memory, ranks=2) == [False, False]


def test_a_wrong_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(direct.VARIABLE, "yes")
    with pytest.raises(UserError, match=r"^HPCML_GPU_MPI='yes' is not known: set one of auto, dev"):
        Mesh()


TRIAL = """
from tests.device import standin
with standin.installed() as cupy:
    from mpi4py import MPI
    from hpcml.comm import direct_probe
    before = cupy.ndarray.set
    {trouble}
    direct_probe.main()
"""
WRONG = "cupy.ndarray.set = lambda x, values: before(x, {values})"


@pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec")
@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ("", Outcome({"devices": [0, 0]})),
        (
            WRONG.format(values="direct_probe.values(0, 0, x.size)"),
            Outcome(failure="messages of 1, 1024, 65536, 4194304 bytes came wrong"),
        ),
        (
            WRONG.format(values="values[::-1].copy()"),
            Outcome(failure="messages of 1024, 65536, 4194304 bytes came wrong"),
        ),
        (
            "cupy.ndarray.get = lambda x: __import__('os').abort()",
            Outcome(failure="killed by SIGABRT"),
        ),
    ],
    ids=["right", "of before", "elsewhere", "crash"],
)
def test_the_trial_looks_at_what_has_come(trouble: str, expected: Outcome) -> None:
    """On the stand-in, whose memory MPI takes."""
    program = [sys.executable, "-c", TRIAL.format(trouble=trouble)]
    found = child.run([find_mpiexec(), "-n", "2", *program], env=PERMISSIVE)
    assert found.found == expected.found
    assert found.failure.endswith(expected.failure) and bool(found.failure) != bool(found.found)


@pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec")
def test_ranks_that_are_told_to_go_by_ucx_are_still_on_one_node() -> None:
    """MPICH then says that each is alone: they would all take the first GPU."""
    program = (
        "import json; from hpcml.comm import Mesh; mesh = Mesh(); node = mesh.node\n"
        "found = mesh.world.allgather_object((node.index, node.local_rank, node.local_size))\n"
        "if mesh.rank == 0: print(json.dumps({'nodes': found}))"
    )
    command = [find_mpiexec(), "-n", "2", sys.executable, "-c", program]
    found = child.run(command, env=child.PERMISSIVE | {APART: "1"})
    assert found.found == {"nodes": [[0, 0, 2], [0, 1, 2]]}, found.failure
