"""Operations that were started: results, order, errors, and those nobody waits for."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Axis, Mesh, Request
from hpcml.comm.request import Worker, worker_of
from tests.comm.jobs import Job

HERE = "test_requests.py"
RANKS = [1, 2, 3, 4]

# Name, arguments after the array, and whether the array has a block for each rank.
OPERATIONS: list[tuple[str, tuple[Any, ...], bool]] = [
    ("allreduce", ("sum",), False),
    ("reduce_scatter", ("sum",), True),
    ("allgather", (), False),
    ("broadcast", (-1,), False),
    ("alltoall", (), True),
    ("reduce", ("max", -1), False),
    ("gather", (-1,), False),
    ("scatter", (-1,), True),
]


def everywhere(check: Callable[[Axis], None]) -> Callable[..., None]:
    """A test of an axis over all ranks: as threads, 1 to 4 of them, and under mpiexec."""

    @pytest.mark.parametrize(
        "ranks", [*RANKS, pytest.param(None, marks=pytest.mark.mpi, id="mpiexec")]
    )
    def test(ranks: int | None) -> None:
        if ranks is None:
            check(Mesh()["dp"])
        else:
            hpcml.run(lambda: check(Mesh()["dp"]), ranks=ranks, timeout=30)

    test.__doc__ = check.__doc__
    return test


def arguments(axis: Axis, given: tuple[Any, ...], wide: bool) -> tuple[Any, ...]:
    x = np.arange(4.0 * (axis.size if wide else 1)) + 10 * axis.rank
    return (x, *(axis.size - 1 if value == -1 else value for value in given))


@everywhere
def test_the_result_is_that_of_the_blocking_form(axis: Axis) -> None:
    """Of every operation, all of them outstanding at once."""
    expected, requests = [], []
    for name, given, wide in OPERATIONS:
        expected.append(getattr(axis, name)(*arguments(axis, given, wide)))
    for name, given, wide in OPERATIONS:
        requests.append(getattr(axis, f"i{name}")(*arguments(axis, given, wide)))
    requests.append(axis.ibarrier())
    for request, result in zip(requests, [*expected, None], strict=True):
        assert isinstance(request, Request)
        found = request.wait()
        assert (found is None) == (result is None)
        if result is not None:
            np.testing.assert_array_equal(found, result)
        assert request.test()
        assert request.wait() is found


@everywhere
def test_hundreds_in_flight_happen_in_order(axis: Axis) -> None:
    total = np.zeros(1)
    requests = []
    for _ in range(100):
        requests.append(axis.iallreduce(total, out=total))
        requests.append(axis.ibroadcast(np.full(3, axis.rank), root=axis.size - 1))
    total += 1  # too late or not, each adds up what the one before has left
    for request in reversed(requests):
        request.wait()
    assert all(request.test() for request in requests)
    assert requests[1].wait().tolist() == [axis.size - 1] * 3


@everywhere
def test_results_in_place_and_blocking_calls_between(axis: Axis) -> None:
    x, y = np.full(1000, 1.0 + axis.rank), np.zeros(1000)
    expected = axis.size * (axis.size + 1) / 2
    in_place = axis.iallreduce(x, out=x)
    beside = axis.allreduce(np.ones(3))
    into = axis.iallreduce(np.full(1000, 1.0 + axis.rank), out=y)
    assert beside.tolist() == [axis.size] * 3
    assert in_place.wait() is x
    assert into.wait() is y
    assert (x == expected).all()
    assert (y == expected).all()


@everywhere
def test_messages(axis: Axis) -> None:
    dest, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    for _ in range(2):
        places = [np.empty((2, 3), np.float32) for _ in range(4)]
        leaving = [
            axis.isend(np.full((2, 3), 10 * axis.rank + n, np.float32), dest, tag=n)
            for n in range(4)
        ]
        coming = [axis.irecv(places[n], source, tag=n) for n in reversed(range(4))][::-1]
        gc.collect()  # what was sent is kept by its request alone
        for n, request in enumerate(coming):
            assert request.wait() is places[n]
            assert request.wait() is places[n]
            assert (places[n] == 10 * source + n).all()
        for request in leaving:
            assert request.wait() is None
            assert request.test()


@everywhere
def test_polling_gets_there_too(axis: Axis) -> None:
    dest, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    leaving = axis.isend(np.arange(3.0), dest)
    requests = [axis.irecv(np.empty(3), source), leaving, axis.iallreduce(np.arange(3.0), "max")]
    while not all(request.test() for request in requests):
        pass
    assert requests[0].wait().tolist() == requests[2].wait().tolist() == [0, 1, 2]


@everywhere
def test_a_request_that_is_done_keeps_no_array(axis: Axis) -> None:
    x = np.ones(5)
    gone = weakref.ref(x)
    requests = [axis.iallreduce(x), axis.isend(x, (axis.rank + 1) % axis.size)]
    requests.append(axis.irecv(np.empty(5), (axis.rank - 1) % axis.size))
    for request in requests:
        request.wait()
    axis.barrier()  # the other end has got it, and the thread has put it down
    del x
    gc.collect()
    assert gone() is None


@everywhere
def test_meshes_of_the_same_ranks_share_a_thread(axis: Axis) -> None:
    """With one each, their operations would meet in another order on every rank."""
    meshes = [Mesh()["dp"] for _ in range(3)]
    requests = [mesh.ibroadcast(np.array([n]), 0) for n in range(20) for mesh in meshes]
    assert [int(r.wait()[0]) for r in requests] == [n for n in range(20) for _ in meshes]
    assert len({id(mesh._worker) for mesh in meshes}) == 1


@everywhere
def test_an_error_tells_where_it_was_started_and_where_it_happened(axis: Axis) -> None:
    def start() -> Request:
        return mine.iallreduce(np.ones(3, complex))

    # An axis of its own: after a failure nothing more goes on in its background.
    mine = Axis("mine", axis.transport.subset(range(axis.size), "mine"))
    if axis.size == 1:
        with pytest.raises(ValueError, match="complex128"):
            start()  # what is over at once fails at once
        return
    request = start()
    for _ in range(2):
        with pytest.raises(ValueError, match="complex128") as caught:
            request.wait()
        assert any(entry.path.name == "buffers.py" for entry in caught.traceback)
        (note,) = [n for n in caught.value.__notes__ if n.startswith("The operation was started")]
        assert f'{HERE}", line {start.__code__.co_firstlineno + 1}, in start' in note
        assert "threading.py" not in note
    with pytest.raises(RuntimeError, match="an earlier operation of this axis failed") as caught:
        mine.iallreduce(np.ones(3)).wait()
    assert isinstance(caught.value.__cause__, ValueError)
    assert mine.allreduce(np.ones(3)).tolist() == [axis.size] * 3


@pytest.mark.parametrize("use", ["start", "call", "end"])
def test_an_error_that_nobody_waited_for_comes_at_the_next_use(use):
    def program() -> None:
        axis = Mesh().world
        axis.iallreduce(np.ones(3), algorithm="none such")
        assert axis._worker is not None
        while axis._worker._failed is None:
            pass
        if use == "start":
            axis.ibarrier()
        elif use == "call":
            axis.barrier()

    with pytest.raises(ValueError, match="none such") as caught:
        hpcml.run(program, ranks=2)
    assert any("Nobody had waited for it" in note for note in caught.value.__notes__)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpcml-")]


def test_an_error_that_was_told_is_not_told_again():
    def program() -> int:
        axis = Mesh().world
        with pytest.raises(ValueError, match="none such"):
            axis.iallreduce(np.ones(3), algorithm="none such").wait()
        return int(axis.allreduce(np.array([1]))[0])

    assert hpcml.run(program, ranks=2) == [2, 2]


def test_a_message_of_another_length_is_an_error_each_time():
    def program() -> None:
        axis = Mesh().world
        if axis.rank == 0:
            axis.isend(np.zeros(3), 1).wait()
            return
        request = axis.irecv(np.empty(2), 0)
        for _ in range(2):
            with pytest.raises(ValueError, match="of 24 bytes came from rank 0") as caught:
                request.wait()
        assert len(caught.value.__notes__) == 1
        assert f"{HERE}" in caught.value.__notes__[0]
        assert request.test()

    hpcml.run(program, ranks=2)


def test_operations_that_nobody_waits_for_are_completed_at_the_end():
    result = [np.zeros(3) for _ in range(3)]

    def program() -> None:
        axis = Mesh().world
        axis.iallreduce(np.ones(3), out=result[axis.rank])

    hpcml.run(program, ranks=3)
    assert [x.tolist() for x in result] == [[3, 3, 3]] * 3


def test_a_thread_ends_with_its_transport():
    def program() -> bool:
        transport = Mesh()._transport.subset((1, 0), "short-lived")
        thread = worker_of(transport, "short-lived")._thread
        Mesh()._transport._subsets.clear()  # type: ignore[attr-defined]
        del transport
        gc.collect()
        thread.join(10)
        return thread.is_alive()

    assert hpcml.run(program, ranks=2) == [False, False]


def test_what_is_not_over_is_not_done():
    worker, go = Worker("test"), threading.Event()
    request = worker.submit(lambda: go.wait(30))
    assert not request.test()
    go.set()
    assert request.wait() is True
    worker.end()


PROGRAM = """
import sys, numpy as np, hpcml
axis = hpcml.Mesh().world
request = axis.iallreduce(np.ones(3), algorithm="none such")
if sys.argv[1] == "wait":
    request.wait()
if sys.argv[1] == "told":
    try:
        request.wait()
    except ValueError:
        pass
"""


@pytest.mark.parametrize("how", ["wait", "forget", "told"])
def test_under_mpiexec_a_lost_error_ends_the_job(job: Job, how: str) -> None:
    process = job(2, PROGRAM, how)
    text, _ = process.communicate(timeout=60)
    if how == "told":
        assert (process.returncode, text) == (0, "")
        return
    assert process.returncode == 1
    assert text.count("algorithm='none such'") == 1
    assert 'File "<string>", line 4, in <module>' in text
    assert ("Nobody had waited for it" in text) == (how == "forget")
