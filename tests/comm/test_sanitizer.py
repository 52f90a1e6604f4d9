"""`HPCML_DEBUG=comm`: what differs between the ranks is an error that shows every rank's call."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Axis, Mesh
from hpcml.comm.sanitizer import MismatchError
from hpcml.errors import UserError
from tests.comm.jobs import Job

LIMIT = 30

PREAMBLE = """
import numpy as np
from hpcml.comm import Mesh
dp = Mesh()["dp"]
"""
LINE = PREAMBLE.count("\n") + 1


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCML_DEBUG", "comm")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=LIMIT)[0]
    return process.returncode, output


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            "dp.broadcast(x) if dp.rank == 1 else dp.allreduce(x)",
            ("allreduce #1, 6 float32, sum", "broadcast #1, 6 float32, root 0"),
        ),
        ("dp.allreduce(x[dp.rank == 1 :])", ("allreduce #1, 6 float32", "allreduce #1, 5 float32")),
        (
            "dp.allreduce(x.astype('i4') if dp.rank == 1 else x)",
            ("allreduce #1, 6 float32", "allreduce #1, 6 int32"),
        ),
    ],
    ids=["operation", "count", "dtype"],
)
def test_a_mismatch_ends_the_job_with_one_message(
    job: Job, call: str, said: tuple[str, str]
) -> None:
    program = PREAMBLE + f"x = np.ones(6, np.float32); {call}; dp.barrier()\n"
    code, output = ended(job(3, program, HPCML_DEBUG="comm", HPCML_TIMEOUT="10"))
    assert code not in (0, None)
    assert output.count("the ranks of axis dp do not call the same:") == 1
    assert output.count("Traceback") == 1
    for rank, what in enumerate((said[0], said[1], said[0])):
        row = next(row for row in output.splitlines() if row.startswith(f"  rank {rank}: "))
        assert what in row and row.endswith(f"at <string>:{LINE}")


def test_without_it_another_operation_on_one_rank_is_found_by_the_watch(job: Job) -> None:
    call = "dp.broadcast(x) if dp.rank == 1 else dp.recv(x, 1)"
    program = PREAMBLE + f"x = np.ones(6, np.float32); dp.broadcast(x); {call}; dp.barrier()\n"
    code, output = ended(job(3, program, HPCML_TIMEOUT="2"))
    assert code not in (0, None)
    assert "in recv with rank 1 on dp" in output and "in b" in output
    assert f"6 float32, at <string>:{LINE}\n" in output


def ranks(function: Callable[[Axis], Any], count: int = 3) -> list[Any]:
    return hpcml.run(lambda: function(Mesh()["dp"]), ranks=count, timeout=20)


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize(
    "call",
    [
        lambda dp: dp.broadcast(np.ones(3), root=dp.rank // 2),
        lambda dp: dp.allreduce(np.ones(3), "max" if dp.rank else "sum"),
        lambda dp: dp.allgather(np.ones(1 + (dp.rank == 1))),
        lambda dp: dp.allgather(np.ones(2), counts=[2, 2, 2] if dp.rank else [2, 3, 1]),
        lambda dp: dp.barrier() if dp.rank else dp.allreduce(np.ones(0)),
        lambda dp: dp.iallreduce(np.ones(3 + dp.rank)).wait(),
    ],
    ids=["root", "op", "rows", "counts", "barrier", "background"],
)  # fmt: skip
def test_whatever_must_agree_is_compared(call: Callable[[Axis], Any]) -> None:
    with pytest.raises(MismatchError, match=r"the ranks of axis dp.* do not call the same"):
        ranks(call)


@pytest.mark.usefixtures("debug")
def test_blocks_of_an_all_to_all_must_fit() -> None:
    with pytest.raises(MismatchError, match="expect blocks of other lengths"):
        ranks(lambda dp: dp.alltoall(np.ones(3), sends=[1, 1, 1], receives=[1, 2, 1]))


@pytest.mark.usefixtures("debug")
def test_a_call_left_out_by_one_rank_is_seen_at_the_next_equal_one() -> None:
    def steps(dp: Axis) -> None:
        if dp.rank != 1:
            dp.allreduce(np.ones(3))
        dp.allreduce(np.ones(3))

    with pytest.raises(MismatchError) as caught:
        ranks(steps)
    places = {row.rpartition(":")[2] for row in str(caught.value).splitlines()[1:]}
    assert len(places) == 2  # two lines of this file


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_calls_that_agree_go_through(count: int) -> None:
    def calls(dp: Axis) -> float:
        x = np.arange(2 * dp.size, dtype=np.float32)
        rows = list(range(1, dp.size + 1))
        mine = np.full((rows[dp.rank], 2), dp.rank)
        assert dp.allgather(mine, counts=rows).shape == (sum(rows), 2)
        gathered = dp.gather(mine, counts=rows, root=dp.size - 1)
        assert (gathered is None) == (dp.rank != dp.size - 1)
        dp.scatter(x, root=0)
        dp.reduce(x, root=dp.size - 1)
        dp.reduce_scatter(x)
        dp.broadcast(x)
        received = [(dp.rank + rank) % 2 for rank in range(dp.size)]
        dp.alltoall(np.ones(sum(received)), sends=received, receives=received)
        dp.barrier()
        assert dp.allgather_object("x" * dp.rank) == ["x" * rank for rank in range(dp.size)]
        return float(dp.iallreduce(np.ones(1)).wait()[0])

    assert ranks(calls, count) == [count] * count


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("debug")
def test_a_mismatch_is_raised_on_every_rank_and_leaves_nothing_behind() -> None:
    dp = Mesh()["dp"]
    with pytest.raises(MismatchError):
        dp.allreduce(np.ones(2 + dp.rank))
    assert dp.allreduce(np.ones(1)) == dp.size


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCML_DEBUG", "all")
    with pytest.raises(UserError, match=r"^HPCML_DEBUG='all' is not known: set comm, or unset it$"):
        Axis("dp")
