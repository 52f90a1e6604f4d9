"""Faults on purpose: harmless ones leave results as they are, the others are reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.comm.faults import Delay, Fault, Raise, Reorder, Stop, Synchronous, WrongCount
from hpcml.comm.world import world

HERE = "test_faults.py:"
HARMLESS: dict[str, list[Fault]] = {
    "delay": [Delay(0.004)],
    "reorder": [Reorder()],
    "synchronous": [Synchronous()],
    "all": [Delay(0.002, seed=1), Reorder(seed=2), Synchronous()],
}


@pytest.fixture(params=HARMLESS)
def harmless(request: pytest.FixtureRequest) -> list[Fault]:
    return HARMLESS[request.param]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_are_right_in_spite_of(harmless, ranks):
    def program() -> list[Any]:
        mesh = Mesh()
        axis, mine = mesh.world, np.arange(6.0) + mesh.rank
        return [
            axis.allreduce(mine),
            axis.reduce_scatter(np.tile(mine, mesh.size)),
            axis.allgather(mine),
            axis.alltoall(np.tile(mine, mesh.size)),
            axis.broadcast(mine, root=mesh.size - 1),
            axis.iallreduce(mine, "max").wait(),
        ]

    def same(found: list[Any], expected: list[Any]) -> None:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)

    plain = hpcml.run(program, ranks=ranks)
    for found, expected in zip(
        hpcml.run(program, ranks=ranks, faults=harmless), plain, strict=True
    ):
        same(found, expected)
    np.testing.assert_array_equal(plain[0][0], ranks * np.arange(6.0) + sum(range(ranks)))


def test_order_within_a_stream_is_kept(harmless):
    def program() -> list[list[int]]:
        base = world()
        others = [rank for rank in range(base.size) if rank != base.rank]
        sent = [
            base.isend(np.array([number]), dest, tag)
            for number in range(5)
            for dest in others
            for tag in (1, 2)
        ]
        places = {
            (source, tag): [np.empty(1, int) for _ in range(5)]
            for source in others
            for tag in (1, 2)
        }
        coming = [base.irecv(x, *stream) for stream, row in places.items() for x in row]
        for message in [*coming, *sent]:
            message.wait()
        return [[int(x[0]) for x in row] for row in places.values()]

    assert hpcml.run(program, ranks=3, faults=harmless) == [[[0, 1, 2, 3, 4]] * 4] * 3


class Place(np.ndarray[Any, Any]):
    """An array that notes in `order` what is written to it, when it is."""

    order: list[int]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.order.append(int(value.view(np.int64)[0]))

    def __array_finalize__(self, other: Any) -> None:
        self.order = getattr(other, "order", [])


def arrivals(streams: int) -> list[int]:
    """Rank 0 sends a message for each tag; the order in which they come to rank 1."""
    base = world()
    order: list[int] = []
    if base.rank == 0:
        base.barrier()
        for tag in range(streams):
            base.isend(np.array([tag]), 1, tag).wait()
        return order
    place = np.zeros(1, np.int64).view(Place)
    place.order = order
    waiting = [base.irecv(place, 0, tag) for tag in range(streams)]
    base.barrier()
    for message in waiting:
        message.wait()
    return order


@pytest.mark.parametrize("fault", [Delay(0.05), Delay(0.05, seed=1), Reorder(), Reorder(seed=1)])
def test_streams_overtake_each_other(fault):
    assert hpcml.run(arrivals, 30, ranks=2)[1] == list(range(30))
    found = hpcml.run(arrivals, 30, ranks=2, faults=[fault])[1]
    assert sorted(found) == list(range(30)) != found


def test_synchronous_sends_expose_reliance_on_buffers():
    def program() -> None:
        axis = Mesh().world
        axis.send(np.ones(1), 1 - axis.rank)
        axis.recv(np.empty(1), 1 - axis.rank)

    hpcml.run(program, ranks=2)
    with pytest.raises(TimeoutError) as caught:
        hpcml.run(program, ranks=2, timeout=0.5, faults=[Synchronous()])
    lines = str(caught.value).splitlines()[1:3]
    assert all(f"rank {rank}: send" in lines[rank] for rank in range(2))
    assert all(HERE in line for line in lines)


def three_sums() -> None:
    axis = Mesh().world
    for _ in range(3):
        axis.allreduce(np.ones(6))


def line_of(function: Callable[[], None], offset: int) -> str:
    return f"{HERE}{function.__code__.co_firstlineno + offset}"


def test_a_rank_that_stops_is_missed():
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        hpcml.run(three_sums, ranks=3, timeout=1, faults=[Stop(1, 2, "allreduce")])
    assert time.monotonic() - start < 20
    first, *ranks, missing = str(caught.value).splitlines()
    assert first.startswith(("rank 0 waited", "rank 2 waited"))
    place = line_of(three_sums, 3)
    assert all("allreduce #" in ranks[rank] and ranks[rank].endswith(place) for rank in (0, 2))
    assert ranks[1].startswith("  rank 1: in no call, at ")
    assert ranks[1].endswith(place)
    assert missing.startswith("Missing in allreduce #")
    assert missing.endswith(": rank 1")


def test_a_rank_that_raises_is_named():
    with pytest.raises(RuntimeError, match="injected fault") as caught:
        hpcml.run(three_sums, ranks=3, faults=[Raise(2, 3, "allreduce")])
    note = caught.value.__notes__[0]
    assert note.startswith("rank 2 of 3 failed.")
    trace = caught.traceback
    assert any(entry.path.name == "test_faults.py" for entry in trace)
    with pytest.raises(OSError, match="of mine"):
        hpcml.run(three_sums, ranks=2, faults=[Raise(0, 1, error=OSError("of mine"))])


@pytest.mark.parametrize("algorithm", ["ring", "recursive_doubling"])
def test_a_wrong_count_is_refused_where_it_arrives(algorithm):
    def program() -> None:
        Mesh().world.allreduce(np.ones(6), algorithm=algorithm)

    with pytest.raises(ValueError, match=r"bytes came from rank 1 .* shapes and types") as caught:
        hpcml.run(program, ranks=3, faults=[WrongCount(1, 1, "allreduce")])
    assert any(entry.path.name == "test_faults.py" for entry in caught.traceback)
    assert "rank 1:" in caught.value.__notes__[0]


def test_a_real_wrong_count_is_refused_or_missed():
    def program() -> None:
        axis = Mesh().world
        axis.broadcast(np.ones(5 if axis.rank == 1 else 6))

    with pytest.raises(ValueError, match=r"of 48 bytes came from rank 0 .* for an array of 40"):
        hpcml.run(program, ranks=3)


def test_a_fault_without_an_occasion_is_an_error():
    with pytest.raises(ValueError, match=r"did not happen: rank 1 made 3 such calls"):
        hpcml.run(three_sums, ranks=2, faults=[Stop(1, 4, "allreduce")])
