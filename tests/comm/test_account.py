"""Memory that communication takes beside its arguments is the rank's, whichever thread takes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import backend, memory
from hpcml.comm import Axis, Mesh
from hpcml.comm.algorithms import algorithms, turns
from hpcml.comm.algorithms.registry import find
from hpcml.comm.reduction import _BLOCK
from hpcml.errors import MemoryLimitError
from tests.comm.algorithms.conformance import Case, serves
from tests.comm.jobs import Job
from tests.ranks import OnRanks, on_ranks_of


def axis_of(deterministic: bool = False) -> Axis:
    return Mesh(deterministic=deterministic)["dp"]


on_ranks = on_ranks_of(axis_of)


def taken(call: Callable[[], Any]) -> int:
    """Bytes of buffers that a call holds at its peak, and no more afterwards."""
    account = memory.account()
    before = account.live
    account.reset_peak()
    call()
    assert account.live == before
    return account.peak["buffers"] - before["buffers"]


def test_scratch_of_both_threads_is_counted(on_ranks: OnRanks) -> None:
    def program(axis: Axis) -> None:
        x = np.ones(12_000)
        axis.iallreduce(x, out=x, algorithm="ordered").wait()  # makes what is made once
        here = taken(lambda: axis.allreduce(x, out=x, algorithm="ordered"))
        there = taken(lambda: axis.iallreduce(x, out=x, algorithm="ordered").wait())
        assert here == there
        assert here >= x.nbytes * (axis.size - 1) // axis.size  # the blocks of the others

    on_ranks(program)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["reduce_scatter", "allreduce", "allgather"])
def test_scratch_does_not_grow_with_long_arrays(
    operation: str, dtype: str, deterministic: bool, on_ranks: OnRanks
) -> None:
    """Of what is chosen for them, and of all that may be; nor if the result is added to."""
    most = 2 * turns.PIECE + 20 * _BLOCK  # what is combined at once, in float32 and widened

    def program(axis: Axis) -> None:
        count = (12 << 20) // backend.dtype(dtype).itemsize
        case = Case(operation, (count // axis.size,) * axis.size, backend.dtype(dtype))
        x, out = (np.zeros(count, case.dtype) for _ in range(2))
        part = out[: case.counts[0]]
        given = {"reduce_scatter": (x, part), "allgather": (part.copy(), x), "allreduce": (x, out)}
        for name, known in [(None, None), *algorithms(operation).items()]:
            for onto in (False, True) if operation != "allgather" else (False,):
                options = {"accumulate": True} if onto else {}
                if known is None or (known.lean(onto) and serves(axis, name, case)):
                    source, target = given[operation]
                    call = partial(getattr(axis, operation), source, out=target, algorithm=name)
                    assert taken(partial(call, **options)) <= most, (name, onto)

    on_ranks(program, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_can_be_told_before(dtype: str, deterministic: bool, on_ranks: OnRanks) -> None:
    """Never less than is taken, and no more where the order makes all ranks wait for all."""

    def program(axis: Axis) -> None:
        kind = backend.dtype(dtype)
        for rows in (0, 1, 1000, 60_000, 900_000):
            x = np.zeros(rows * axis.size, kind)
            out = np.zeros(rows, kind)
            for onto in (False, True):
                told = axis.scratch(x.size, kind)
                call = partial(axis.reduce_scatter, x, out=out, accumulate=onto)
                assert taken(call) <= told, (rows, onto)
                if axis.size > 1 and (deterministic or dtype == "bfloat16"):
                    held = taken(partial(call, algorithm="ordered"))
                    assert held <= told <= held + 4 * min(_BLOCK, rows), (rows, onto)

    on_ranks(program, deterministic=deterministic)


@pytest.mark.parametrize("nbytes", [300_001, 1 << 19, 1 << 20, 3 << 20])
def test_scratch_is_little_beside_blocks_of_a_few_pieces(nbytes: int, on_ranks: OnRanks) -> None:
    """It was as much as a block of 1 MiB, and above the bound of what ZeRO may hold."""

    def program(axis: Axis) -> None:
        rows = nbytes // 4
        told = axis.scratch(rows * axis.size, np.dtype("float32"))
        assert told <= 4 * _BLOCK + (rows * 2 + 200 if axis.size > 1 else 0)  # and for sums
        x, out = np.ones(rows * axis.size, "f"), np.empty(rows, "f")
        for name in ("pairwise", None):
            out[...] = 0
            assert taken(partial(axis.reduce_scatter, x, out=out, algorithm=name)) <= told
            assert (out == axis.size).all()

    on_ranks(program)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("operation", ["reduce_scatter", "allreduce"])
def test_what_is_refused_has_sent_nothing(
    operation: str, dtype: str, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the message would come where ranks that go on await another.

    That was so in 16 bits, and where a result is added to: memory for sums was taken too late.
    """
    monkeypatch.setattr(turns, "PIECE", 1 << 13)
    kind = backend.dtype(dtype)

    def program(axis: Axis) -> None:
        x = (np.arange(3 * turns.PIECE // kind.itemsize * axis.size) % 32).astype(kind)
        expected = x * kind.type(axis.size)
        if operation == "reduce_scatter":
            expected = np.split(expected, axis.size)[axis.rank]
        for name, onto in product(algorithms(operation), (False, True)):
            case = Case(operation, (x.size // axis.size,) * axis.size, kind)
            if not find(operation, name).lean(onto) or not serves(axis, name, case):
                continue
            out = np.zeros(expected.shape, kind)
            call = partial(getattr(axis, operation), out=out, algorithm=name, accumulate=onto)
            most = taken(partial(call, x))
            for limit in (most // 2, most - 1) if most else ():
                memory.set_limit(memory.account().total + limit)
                with pytest.raises(MemoryLimitError):
                    call(-x)
                memory.set_limit(0)
                assert axis._link.take_counts() == (0, 0), (name, onto)
                out[...] = 0
                call(x)
                np.testing.assert_array_equal(out, expected, err_msg=name)

    on_ranks(program)


def test_results_are_the_callers(on_ranks: OnRanks) -> None:
    def program(axis: Axis) -> None:
        account = memory.account()
        before = account.live
        with memory.category("grads"):
            result = axis.iallgather(np.ones(5)).wait()
        assert account.live == before | {"grads": before["grads"] + 40 * axis.size}
        assert result.size == 5 * axis.size

    on_ranks(program)


def test_no_limit_keeps_ranks_from_telling_each_other(on_ranks: OnRanks) -> None:
    """One that was refused memory has none to tell it with, and the others wait for its words."""

    def program(axis: Axis) -> None:
        memory.set_limit(1)
        try:
            assert axis.allgather_object("refused") == ["refused"] * axis.size
            with pytest.raises(MemoryLimitError):
                axis.allgather(np.ones(9))
        finally:
            memory.set_limit(0)

    on_ranks(program)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_a_limit_holds_in_the_background(ranks: int, first: int) -> None:
    """All ranks are told, or those who are not exceeded are woken; each where it waits."""

    def program() -> None:
        axis, x = Mesh()["dp"], np.ones(12_000)
        if axis.rank >= first:
            memory.set_limit(1000)
        request = axis.iallreduce(x, out=x, algorithm="ordered")
        request.wait()

    with pytest.raises(MemoryLimitError) as caught:
        hpcml.run(program, ranks=ranks, timeout=30)
    text = str(caught.value)
    assert "bytes of buffers exceed the memory limit of 1,000" in text
    assert "where did all the memory go" in text
    assert any("started at" in n and "in program" in n for n in caught.value.__notes__)


PROGRAM = """
import numpy as np, hpcml
axis, x = hpcml.Mesh()["dp"], np.ones(12_000)
if axis.rank == 1:
    hpcml.memory.set_limit(1000)
request = axis.iallreduce(x, out=x, algorithm="ordered")
axis.barrier()
request.wait()
"""


def test_under_mpiexec_a_limit_in_the_background_ends_the_job(job: Job) -> None:
    process = job(3, PROGRAM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2, text
    assert text.count("where did all the memory go") == 1
    assert "bytes of buffers exceed the memory limit of 1,000" in text
    assert 'File "<string>", line 6, in <module>' in text
