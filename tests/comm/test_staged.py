"""Ordinary memory by way of shared memory: any number of turns, and ranks that are late."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcml.comm import meeting, window
from hpcml.comm.meeting import Meeting
from hpcml.comm.window import Scratch, Window

Array = np.ndarray[Any, Any]
ROOM = 192
"""Elements of a turn, of which a slice of three ranks has whole lanes."""
CALLS = 4

cases = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def short_turns_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "CHUNK", ROOM * 4)
    for name in ("_SPINS", "_YIELDS"):
        monkeypatch.setattr(meeting, name, 2)


def numbers(rank: int, call: int, count: int, dtype: str) -> Array:
    """What a rank contributes; rounding shows the order in which it is added up."""
    rng = np.random.default_rng([rank, call])
    return (rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)).astype(dtype)


def in_order(arrays: Sequence[Array]) -> Array:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total = total + array
    return total


def on_ranks(ranks: int, program: Callable[[int, Scratch], None]) -> int:
    """Run it on so many threads with memory that they share; how often one waited in vain."""
    flags, memory = mmap.mmap(-1, mmap.PAGESIZE), mmap.mmap(-1, ranks * 4 * mmap.PAGESIZE)
    failures: list[Exception] = []
    waits: list[float] = []

    def slowly(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    def rank(number: int) -> None:
        local: Any = SimpleNamespace(size=ranks, rank=number, members=tuple(range(ranks)))
        shared = Window(local, memory, 4 * mmap.PAGESIZE, 1)
        try:
            program(number, Scratch(shared, Meeting(local, flags)))
        except (AssertionError, ValueError) as error:
            failures.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "time", SimpleNamespace(sleep=slowly))
        threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    for error in failures:
        raise error
    return len(waits)


def late(rank: int, call: int) -> None:
    """Let each rank be the last in turn; the first by so much that it comes last for certain."""
    if call % 3 == rank:
        threading.Event().wait(2e-3 if call else 5e-2)


@cases("dtype", ["float32", "float64"])
@cases("onto", [False, True])
@cases("whole", [False, True])
@cases("ranks", [2, 3, 5])
@cases("count", [1, 100, 1000])
def test_sum(count: int, ranks: int, whole: bool, onto: bool, dtype: str) -> None:
    """The same bits as one after the other, in place as well."""

    def program(rank: int, scratch: Scratch) -> None:
        for call in range(CALLS):
            late(rank, call)
            arrays = [numbers(k, call, count, dtype) for k in range(ranks)]
            x, before = arrays[rank], numbers(ranks, call, count, dtype)
            out = before.copy() if onto else x if call % 2 else np.full_like(x, np.nan)
            expected = in_order([before, *arrays] if onto else arrays)
            scratch.sum(x, out, whole, onto)
            assert out.tobytes() == expected.tobytes()

    assert on_ranks(ranks, program)


@cases("dtype", ["float32", "float64"])
@cases("onto", [False, True])
@cases("counts", [(1, 1), (0, 700), (100, 0, 30), (400, 400, 400), (64, 1, 0, 5, 900)], ids=str)
def test_scatter(counts: tuple[int, ...], onto: bool, dtype: str) -> None:
    """Blocks of any length; the result may lie in the input, of which nothing else changes."""
    ranks, edges = len(counts), np.cumsum([0, *counts])

    def program(rank: int, scratch: Scratch) -> None:
        own = slice(edges[rank], edges[rank + 1])
        for call in range(CALLS):
            late(rank, call)
            arrays = [numbers(k, call, edges[-1], dtype) for k in range(ranks)]
            x, before = arrays[rank].copy(), numbers(ranks, call, counts[rank], dtype)
            out = before.copy() if onto else x[own] if call % 2 else np.empty(counts[rank], dtype)
            parts = [array[own] for array in arrays]
            scratch.scatter(edges, max(counts), x, out, onto)
            assert out.tobytes() == in_order([before, *parts] if onto else parts).tobytes()
            x[own] = arrays[rank][own]
            assert x.tobytes() == arrays[rank].tobytes()

    assert on_ranks(ranks, program)


@cases("dtype", ["float32", "float64"])
@cases("counts", [(1, 1), (0, 700), (100, 0, 30), (400, 400, 400), (64, 1, 0, 5, 900)], ids=str)
def test_gather(counts: tuple[int, ...], dtype: str) -> None:
    """Where a rank's own part lies already it stays."""
    ranks, edges = len(counts), np.cumsum([0, *counts])

    def program(rank: int, scratch: Scratch) -> None:
        own = slice(edges[rank], edges[rank + 1])
        for call in range(CALLS):
            late(rank, call)
            arrays = [numbers(k, call, counts[k], dtype) for k in range(ranks)]
            out = np.full(edges[-1], np.nan, dtype)
            x = arrays[rank]
            if call % 2:
                out[own] = x
                x = out[own]
            scratch.gather(edges, max(counts), x, out)
            assert out.tobytes() == np.concatenate(arrays).tobytes()

    assert on_ranks(ranks, program)
