"""Sums that ranks add to when they come to them: right whatever the order, and nobody waits."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import memory
from hpcml.comm import Mesh, meeting, running
from hpcml.comm.board import Board
from hpcml.comm.faults import Delay
from hpcml.comm.ledger import Ledger
from hpcml.comm.running import ByMessages, OnNode, RunningSums, running_sums
from hpcml.kernels.cpu.running import BLOCK
from tests.comm.jobs import Job

Array = np.ndarray[Any, Any]
cases = pytest.mark.parametrize
SUMS = 12
LONG = 3 * BLOCK + 5


def numbers(rank: int, index: int, size: int) -> Array:
    """What a rank adds to a sum: small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng([rank, index]).integers(-99, 99, size).astype(float)


def sums_of(ranks: int, size: int, room: int, dtype: str = "float64") -> list[OnNode]:
    """Those of ranks that are threads here, in memory that processes could share."""
    width, stride = running._layout(ranks, size, np.dtype(dtype))
    region = mmap.mmap(-1, room * (width * 8 + stride) + mmap.PAGESIZE)
    made = []
    for rank in range(ranks):
        transport = SimpleNamespace(members=tuple(range(ranks)), board=Board())
        axis: Any = SimpleNamespace(
            name="dp", size=ranks, rank=rank, transport=transport, ledger=Ledger()
        )
        own = memory.adopt(
            region, 0, (8,), np.uint8, "buffers", SimpleNamespace(region=region, number=1)
        )
        made.append(OnNode(axis, own, size, np.dtype(dtype), room))
    return made


def walk(sums: RunningSums, ranks: int, rank: int, size: int, dtype: str = "float64") -> int:
    """Add to all sums at moments of chance, and read all; how often one was late for a rank."""
    chance, late, read = random.Random(rank), 0, 0
    for index in range(SUMS):
        if chance.random() < 0.5:
            time.sleep(chance.random() * 0.002)
        while len(sums) == sums.room or (len(sums) and chance.random() < 0.4):
            late += not sums.ready()
            check(sums, ranks, read, size)
            read += 1
        sums.add(numbers(rank, index, size).astype(dtype), rank + 10 * index)
    while len(sums):
        check(sums, ranks, read, size)
        read += 1
    assert read == SUMS and not sums.ready()
    return late


def check(sums: RunningSums, ranks: int, index: int, size: int) -> None:
    """The first sum is the one of this number; drop it."""
    total, given = sums.first()
    assert sums.ready()
    expected = sum(numbers(rank, index, size) for rank in range(ranks))
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(given, [rank + 10 * index for rank in range(ranks)])
    sums.drop()


def together(programs: list[Callable[[], Any]]) -> None:
    """Run each in a thread of its own, and raise what one of them raises."""
    failures: list[BaseException] = []

    def guarded(program: Callable[[], Any]) -> None:
        try:
            program()
        except BaseException as error:  # noqa: BLE001 (raised below)
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(p,), daemon=True) for p in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


@cases("room", [1, 2, 3])
@cases("size", [1, LONG])
@cases(("ranks", "dtype"), [(2, "float32"), (3, "float64"), (5, "float32")])
def test_sums_of_ranks_that_come_when_they_like(
    ranks: int, dtype: str, size: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_SPINS", 20)
    monkeypatch.setattr(meeting, "_YIELDS", 2)
    together(
        [
            lambda sums=sums, rank=rank: walk(sums, ranks, rank, size, dtype)  # type: ignore[misc]
            for rank, sums in enumerate(sums_of(ranks, size, room, dtype))
        ]
    )


def naps(monkeypatch: pytest.MonkeyPatch, *then: Callable[[], Any]) -> list[float]:
    """Do these one by one where a rank would sleep because it waits; how long it would have."""
    slept: list[float] = []
    left = iter(then)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        next(left, lambda: pytest.fail("it waits for nothing"))()

    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=sleep))
    return slept


def test_nobody_waits_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the others are behind, up to the room there is."""
    one, other = sums_of(2, LONG, 3)
    naps(monkeypatch)
    for index in range(3):
        assert not one.ready()
        one.add(numbers(0, index, LONG), 10 * index)
    with pytest.raises(ValueError, match="room for 3 sums"):
        one.add(numbers(0, 3, LONG))
    for index in range(3):
        assert not one.ready()
        other.add(numbers(1, index, LONG), 1 + 10 * index)
        check(one, 2, index, LONG)


def test_a_place_is_free_when_all_have_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sums_of(2, 7, 1)
    one.add(numbers(0, 0, 7))
    other.add(numbers(1, 0, 7), 1)
    check(one, 2, 0, 7)
    slept = naps(monkeypatch, lambda: None, lambda: check(other, 2, 0, 7))
    one.add(numbers(0, 1, 7), 10)
    assert len(slept) == 2
    other.add(numbers(1, 1, 7), 11)
    check(one, 2, 1, 7)


def test_a_block_that_another_rank_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is added to once, those after it too."""
    one, other = sums_of(2, LONG, 1)
    words = one._blocks[0]
    words[1] = -1
    slept = naps(monkeypatch, lambda: None, lambda: words.__setitem__(1, 0))
    one.add(numbers(0, 0, LONG))
    assert len(slept) == 2
    other.add(numbers(1, 0, LONG), 1)
    check(one, 2, 0, LONG)


@cases("size", [1, 1000])
def test_sums_by_messages(size: int) -> None:
    def program() -> int:
        axis = Mesh()["dp"]
        sums = running_sums(axis, size, np.float64, 2)
        assert isinstance(sums, ByMessages)  # threads have no memory that processes share
        return walk(sums, axis.size, axis.rank, size)

    assert sum(hpcml.run(program, ranks=3, faults=[Delay(0.002, seed=1)])) > 0


@pytest.mark.mpi(min_size=2)
@cases("size", [1, LONG])
def test_ranks_of_a_node_share_the_memory(size: int) -> None:
    mesh = Mesh()
    axis = mesh["dp"]
    sums = running_sums(axis, size, np.float32, 2)
    assert isinstance(sums, OnNode)
    before = mesh.ledger.snapshot()
    walk(sums, axis.size, axis.rank, size, "float32")
    count = (mesh.ledger.snapshot() - before)["dp"]["accumulate"]
    sent = -(-4 * size * (axis.size - 1) // axis.size)
    assert (count.calls, count.bytes, count.bytes_sent) == (SUMS, SUMS * 4 * size, SUMS * sent)


PROGRAM = """
import time
import numpy as np
from hpcml.comm import Mesh
from hpcml.comm.running import running_sums
axis = Mesh()["dp"]
others = running_sums(axis, 5, np.float32, 4)
sums = running_sums(axis, 5, np.float32, 1)
for _ in range(3):
    if axis.rank != 1: time.sleep(0.1)
    others.add(np.ones(5, np.float32))
    others.first(), others.drop()
sums.add(np.ones(5, np.float32))
sums.first(), sums.drop()
if axis.rank == 1: time.sleep(100)
sums.add(np.ones(5, np.float32))
sums.first()
"""


def test_who_is_missing_from_a_sum_is_told(job: Job) -> None:
    """It was taken to be further, where it had waited for as many of others."""
    process = job(3, PROGRAM, HPCML_TIMEOUT="2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    place = "on dp, sums in window 2 (ranks 0-2), 5 float32, at <string>:17\n"
    assert f"in sum #2 {place}" in output
    assert "missing: rank 1, computing for" in output
