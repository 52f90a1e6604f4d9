"""Ranks as threads: messages, worlds, what belongs to a rank, and how a job ends."""

from __future__ import annotations

import _thread
import itertools
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import hpcml
from hpcml import memory, rng
from hpcml.autograd import Tensor
from hpcml.comm import Axis, Mesh
from hpcml.comm.mailbox import ThreadTransport
from hpcml.comm.positions import ThreadBoard
from hpcml.comm.request import Worker
from hpcml.comm.threads import OtherRankFailed
from hpcml.comm.world import world
from tests.parallel.cases import reference
from tests.parallel.cases import run as train

HERE = "test_threads.py:"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def boards() -> Sequence[ThreadBoard]:
    """The positions of the ranks of this thread's job."""
    base = world()
    assert isinstance(base, ThreadTransport)
    return base.job.boards


def ring(axis: Axis, shift: int = 1) -> tuple[int, int]:
    """Whom to send to and whom to receive from."""
    return (axis.rank + shift) % axis.size, (axis.rank - shift) % axis.size


def test_the_example_of_the_documentation():
    text = hpcml.run.__doc__
    assert text is not None
    lines = itertools.dropwhile(lambda line: "def sums" not in line, text.splitlines())
    program = textwrap.dedent("\n".join(itertools.islice(lines, 5)))
    *definition, call = program.splitlines()
    scope = {"hpcml": hpcml, "np": np}
    exec("\n".join(definition), scope)
    assert [x.tolist() for x in eval(call, scope)] == [[60, 60, 60]] * 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_results_are_in_the_order_of_the_ranks(ranks):
    def program(offset: int) -> tuple[int, int, list[int]]:
        axis = Mesh()["dp"]
        return axis.rank + offset, axis.size, axis.allgather(np.array([axis.rank])).tolist()

    expected = [(rank + 10, ranks, list(range(ranks))) for rank in range(ranks)]
    assert hpcml.run(program, 10, ranks=ranks) == expected


def test_a_mesh_lays_out_the_threads():
    def program() -> tuple[dict[str, int], list[int], list[int], str]:
        mesh = Mesh(dp=2, tp=3)
        mine = np.array([mesh.rank])
        tp, dp = mesh["tp"].allgather(mine).tolist(), mesh["dp"].allgather(mine).tolist()
        return {k: v for k, v in mesh.coords.items() if mesh.sizes[k] > 1}, dp, tp, mesh.describe()

    found = hpcml.run(program, ranks=6)
    assert [coords for coords, *_ in found] == [
        {"dp": dp, "tp": tp} for dp in range(2) for tp in range(3)
    ]
    assert found[4][1:3] == ([1, 4], [3, 4, 5])
    assert "6 ranks on 1 node" in found[0][3]


def test_ranks_may_pretend_to_be_on_several_nodes():
    def program() -> list[tuple[int, int, int]]:
        mesh = Mesh()
        return [(node.index, node.local_rank, node.local_size) for node in mesh.nodes]

    # The mesh counts node by node; a node's number is the place of its first rank.
    expected = [(0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3)]
    assert hpcml.run(program, ranks=5, nodes=[1, 0, 0, 1, 0]) == [expected] * 5
    hosts = hpcml.run(lambda: [node.host for node in world().nodes()], ranks=2, nodes=[0, 1])[0]
    assert len(set(hosts)) == 2


def test_messages_keep_their_order_within_a_tag_and_not_between_tags():
    def program() -> list[list[float]]:
        axis = Mesh().world
        dest, source = ring(axis)
        for tag in (1, 2):
            for number in range(3):
                x = np.array([10.0 * tag + number])
                axis.send(x, dest, tag)
                x[0] = -1  # a message that was sent does not change any more
        return [[axis.recv(np.empty(1), source, tag)[0] for _ in range(3)] for tag in (2, 1)]

    assert hpcml.run(program, ranks=3) == [[[20, 21, 22], [10, 11, 12]]] * 3


def test_groups_do_not_get_the_messages_of_others():
    def program() -> bool:
        base = world()
        group = (2, 0, 1)
        first, second = base.subset(group, "a"), base.subset(group, "b")
        assert first is base.subset(group, "a")
        assert first.members == group
        assert group[first.rank] == base.rank
        carriers = [base, first, second]
        for number, carrier in enumerate(carriers):
            carrier.isend(np.array([number, base.rank]), (carrier.rank + 1) % 3, 0).wait()
        found = []
        for carrier in reversed(carriers):
            place = np.empty(2, int)
            carrier.irecv(place, (carrier.rank - 1) % 3, 0).wait()
            found.append(place.tolist())
        return found == [
            [number, carrier.members[(carrier.rank - 1) % 3]]
            for number, carrier in reversed(list(enumerate(carriers)))
        ]

    assert hpcml.run(program, ranks=3) == [True] * 3


def test_a_synchronous_send_waits_for_its_receiver():
    def program() -> tuple[bool, bool]:
        base = world()
        if base.rank == 1:
            base.barrier()
            base.irecv(np.empty(3), 0, 5).wait()
            return True, True
        sent = base.isend(np.ones(3), 1, 5, synchronous=True)
        before = sent.test()
        base.barrier()
        sent.wait()
        return before, sent.test()

    assert hpcml.run(program, ranks=2)[0] == (False, True)


def test_a_message_of_another_length_is_refused():
    def program() -> None:
        axis = Mesh().world
        if axis.rank == 0:
            axis.send(np.zeros(3), 1, tag=4)
        else:
            axis.recv(np.empty(2), 0, tag=4)

    with pytest.raises(
        ValueError, match=r"of 24 bytes came from rank 0 \(tag 4\) for an array of 16"
    ):
        hpcml.run(program, ranks=2)


def test_a_barrier_lets_no_rank_pass_early():
    come: list[int] = []

    def program() -> list[int]:
        axis = Mesh().world
        seen = []
        for _ in range(20):
            come.append(axis.rank)
            axis.barrier()
            seen.append(len(come))
            axis.barrier()
        return seen

    assert hpcml.run(program, ranks=4) == [list(range(4, 84, 4))] * 4


def test_a_barrier_with_a_limit_tells_who_came():
    def program() -> tuple[bool, bool]:
        base = world()
        first = base.barrier_within(30)
        if base.rank == 2:
            return first, False
        return first, base.barrier_within(0.05)

    assert hpcml.run(program, ranks=3) == [(True, False)] * 3


@pytest.mark.parametrize("kind", ["own", "gpt"])  # both with dropout
def test_training_is_the_same_as_by_one_process(kind):
    expected = reference(kind, "float64", "adamw", 5, 5)

    def program() -> list[float]:
        return train(kind, Mesh(), "float64", "adamw", 5, 1, 5).losses

    for losses in hpcml.run(program, ranks=3):
        np.testing.assert_allclose(losses, expected.losses, rtol=1e-12)


def test_what_belongs_to_a_thread_belongs_to_a_rank():
    hpcml.manual_seed(123)
    before = dict(memory.account().live)

    def program() -> tuple[int, int, bool, int]:
        axis = Mesh().world
        fresh = rng.seed()
        hpcml.manual_seed(axis.rank)
        if axis.rank == 0:
            with hpcml.no_grad():
                axis.barrier()
                axis.barrier()
        else:
            axis.barrier()
        recording = (Tensor(np.ones(2), requires_grad=True) * 2).requires_grad
        if axis.rank:
            axis.barrier()
        kept = memory.empty((100 * axis.rank,), np.uint8, "optim")
        axis.barrier()
        return fresh, rng.seed(), recording, memory.account().live["optim"] + 0 * kept.size

    assert hpcml.run(program, ranks=3) == [(0, rank, True, 100 * rank) for rank in range(3)]
    assert rng.seed() == 123
    assert memory.account().live == before
    hpcml.manual_seed(0)


def test_a_communication_thread_belongs_to_the_rank_that_started_it():
    def program() -> tuple[int, int]:
        return Worker("test").submit(lambda: (world().size, world().rank)).wait()

    assert hpcml.run(program, ranks=3) == [(3, rank) for rank in range(3)]


def test_a_rank_may_run_ranks_itself():
    def inner() -> int:
        return int(Mesh().world.allreduce(np.array([1]))[0])

    def outer() -> tuple[list[int], int]:
        return hpcml.run(inner, ranks=3), Mesh().size

    assert hpcml.run(outer, ranks=2) == [([3, 3, 3], 2)] * 2


def test_the_error_of_a_rank_is_raised_and_wakes_the_others():
    woken = []

    def program() -> None:
        axis = Mesh().world
        if axis.rank == 2:
            raise KeyError("mine")
        try:
            axis.allreduce(np.ones(3, np.float32))
        except OtherRankFailed as error:
            woken.append(str(error))
            raise

    with pytest.raises(KeyError, match="mine") as caught:
        hpcml.run(program, ranks=3)
    assert woken == ["rank 2 failed: KeyError: 'mine'"] * 2
    (note,) = caught.value.__notes__
    assert note.startswith("rank 2 of 3 failed.")
    assert "rank 2: has raised KeyError" in note


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_rank_is_ended_where_the_first_call_to_end_is_ignored():
    """Python ignores what is raised in a `__del__`: the rank computed on and on."""
    busy = threading.Event()

    class Slow:
        def __del__(self) -> None:
            busy.set()
            while True:
                pass

    def program() -> None:
        if Mesh().rank == 1:
            Slow()
            while True:
                pass
        busy.wait(30)
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        hpcml.run(program, ranks=2)
    assert not any("could not be ended" in note for note in caught.value.__notes__)


def test_the_note_says_where_the_others_were():
    inside = threading.Barrier(3)

    def program() -> None:
        axis = Mesh().world
        inside.wait(30)
        if axis.rank == 0:
            axis.recv(np.empty(7, np.float32), 1)
        elif axis.rank == 1:
            while True:
                time.sleep(0.01)
        else:
            while not boards()[0].calls():
                time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        hpcml.run(program, ranks=3)
    lines = caught.value.__notes__[0].splitlines()
    assert lines[1].startswith("  rank 0: recv")
    assert "7 float32" in lines[1]
    assert HERE in lines[1]
    assert lines[2].startswith("  rank 1: in no call, at ")
    assert HERE in lines[2]


def test_a_wait_that_is_too_long_says_who_is_missing():
    def program() -> None:
        mesh = Mesh(dp=2, tp=2)
        if mesh.rank != 3:
            mesh["tp"].allreduce(np.ones(5))
        mesh.world.barrier()

    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        hpcml.run(program, ranks=4, timeout=1)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert "longer than 1 s" in text
    assert len([line for line in text.splitlines() if HERE in line]) == 4
    # Rank 2 misses rank 3, the others miss rank 2: it depends on who finds out first.
    assert "Missing in allreduce #1: rank 3" in text or "Missing in barrier" in text


def test_a_polled_message_ends_with_the_job_too():
    def program() -> None:
        axis = Mesh().world
        if axis.rank == 1:
            raise KeyError("gone")
        request = axis.irecv(np.empty(1), 1)
        while not request.test():
            time.sleep(0.001)
        request.wait()

    with pytest.raises(KeyError, match="gone"):
        hpcml.run(program, ranks=2)


def test_the_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("HPCML_TIMEOUT", "0.2")
    with pytest.raises(TimeoutError, match=r"longer than 0\.2 s"):
        hpcml.run(lambda: world().rank or world().barrier(), ranks=2)
    monkeypatch.setenv("HPCML_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="HPCML_TIMEOUT='soon'"):
        hpcml.run(int, ranks=2)


@pytest.mark.parametrize("computes", [0, 2])
def test_an_interrupt_ends_ranks_that_wait_and_ranks_that_compute(computes: int):
    ended = []

    def program() -> None:
        base = world()
        try:
            if base.rank == 1:
                time.sleep(0.1)
                _thread.interrupt_main()
            while base.rank == computes:
                pass
            base.barrier()
        finally:
            ended.append(base.rank)

    with pytest.raises(KeyboardInterrupt) as caught:
        hpcml.run(program, ranks=3)
    assert f"rank {computes}: in no call" in caught.value.__notes__[0]
    assert sorted(ended) == [0, 1, 2]


def test_abort_ends_the_job():
    def program() -> None:
        if world().rank == 1:
            world().abort(7)
        world().barrier()

    with pytest.raises(RuntimeError, match="rank 1 ended the job with code 7"):
        hpcml.run(program, ranks=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ranks": 0}, "ranks=0"), ({"ranks": 3, "nodes": [0, 1]}, "2 nodes for 3 ranks")],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        hpcml.run(int, **options)


@pytest.mark.parametrize("deterministic", [False, True])
def test_adding_again_to_the_same_array(deterministic: bool):
    """Without order the sum comes first, then the addition: it is not one call to be repeated."""

    def program() -> None:
        axis = Mesh(deterministic=deterministic)["dp"]
        x, out, whole = np.ones(axis.size), np.zeros(1), np.zeros(axis.size)
        for turn in range(1, 4):
            axis.reduce_scatter(x, out=out, accumulate=True)
            axis.allreduce(x, out=whole, accumulate=True)
            assert out == turn * axis.size and (whole == turn * axis.size).all()
        axis.reduce_scatter(x, out=out)
        axis.allreduce(x, out=whole)
        assert out == axis.size and (whole == axis.size).all()

    hpcml.run(program, ranks=3)
