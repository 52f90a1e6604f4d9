"""What the ledger counts: the numbers of the contract, worked by hand."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcml.comm import Axis, Count, Ledger, Mesh, Tally
from hpcml.comm.ledger import volume


def test_snapshots_subtract_and_reset() -> None:
    ledger = Ledger()
    ledger.record("dp", "all_reduce", 100, 50)
    before = ledger.snapshot()
    ledger.record("dp", "all_reduce", 10, 5)
    ledger.record("tp", "send", 7, 7)
    assert before == {"dp": {"all_reduce": Count(1, 100, 50)}}
    assert ledger.snapshot()["dp"]["all_reduce"] == Count(2, 110, 55)
    step = ledger.snapshot() - before
    assert step == {"dp": {"all_reduce": Count(1, 10, 5)}, "tp": {"send": Count(1, 7, 7)}}
    send = {"calls": 1, "bytes": 7, "bytes_sent": 7, "bytes_off_node": 0}
    assert step.plain()["tp"] == {"send": send}
    assert ledger.snapshot() - ledger.snapshot() == Tally()
    ledger.reset()
    assert ledger.snapshot() == {}


def test_no_call_is_lost_between_threads() -> None:
    ledger = Ledger()

    def count() -> None:
        for _ in range(2000):
            ledger.record("dp", "send", 1, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.snapshot()["dp"]["send"] == Count(8000, 8000, 8000)


@pytest.mark.parametrize(
    ("operation", "size", "sent"),
    [
        ("all_reduce", 4, 1500),
        ("reduce_scatter", 4, 750),
        ("all_gather", 4, 750),
        ("all_to_all", 3, 667),
        ("broadcast", 4, 1000),
        ("reduce", 4, 1000),
        ("gather", 4, 250),
        ("scatter", 4, 750),
        ("send", 4, 1000),
    ],
)
def test_volume_of_the_standard_algorithms(operation: str, size: int, sent: int) -> None:
    assert volume(operation, 1000, size, forwards=True) == sent


def test_an_axis_of_size_1_communicates_nothing() -> None:
    axis = Axis("dp")
    axis.allreduce(np.ones(4))
    axis.allgather(np.ones(4))
    axis.barrier()
    assert axis.ledger.snapshot() == {}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_payload_is_what_the_contract_says(dtype: str) -> None:
    mesh = Mesh()
    axis, n = mesh["dp"], mesh.size
    block = np.ones((5, 2), dtype)
    whole = np.ones((5 * n, 2), dtype)
    b, w = block.nbytes, whole.nbytes
    half = dtype == "float16"
    axis.allreduce(block, algorithm=None if half else "vendor")
    axis.reduce_scatter(whole)
    axis.allgather(block)
    axis.broadcast(block)
    axis.reduce(block)
    axis.alltoall(whole)
    axis.gather(block)
    axis.scatter(whole)
    if axis.rank == 0:
        axis.send(block, 1)
    elif axis.rank == 1:
        axis.recv(block, 0)
    axis.barrier()
    counts = mesh.ledger.snapshot()["dp"]
    payload = dict(all_reduce=b, reduce_scatter=w, all_gather=w, broadcast=b, reduce=b)
    payload |= dict(all_to_all=w, gather=w, scatter=w, barrier=0)
    payload |= dict(send=b) if axis.rank == 0 else {}
    assert {name: count.bytes for name, count in counts.items()} == payload
    assert {count.calls for count in counts.values()} == {1}
    if half:
        return  # what each algorithm sends: see tests/comm/algorithms
    first, last = axis.rank == 0, axis.rank == n - 1
    assert counts["all_reduce"].bytes_sent == -(-2 * (n - 1) * b // n)
    assert counts["reduce_scatter"].bytes_sent == w // n * (n - 1)
    assert counts["broadcast"].bytes_sent == (0 if last else b)
    assert counts["reduce"].bytes_sent == (0 if first else b)
    assert counts["gather"].bytes_sent == (0 if first else b)
    assert counts["scatter"].bytes_sent == (w - b if first else 0)


@pytest.mark.mpi(min_size=2)
def test_shared_memory_counts_the_same_for_every_type() -> None:
    """What others may fetch: not a rank's own block."""
    axis = (mesh := Mesh())["dp"]
    if not axis.shares_memory:
        pytest.skip("the ranks cannot share memory")
    size = mesh.size
    x = np.ones((64 * size, 80))  # slices of whole cache lines, longer than each sums alone
    for given in (x, x.astype("int64")):
        before = mesh.ledger.snapshot()
        axis.allreduce(given, algorithm="staged")
        axis.reduce_scatter(given, algorithm="staged")
        axis.alltoall(given, algorithm="staged")
        counts = (mesh.ledger.snapshot() - before)["dp"]
        slices = 0 if size == 2 else x.nbytes // size
        assert counts["all_reduce"].bytes_sent == x.nbytes + slices
        assert counts["reduce_scatter"].bytes_sent == x.nbytes - x.nbytes // size
        assert counts["all_to_all"].bytes_sent == x.nbytes - x.nbytes // size


@pytest.mark.mpi(min_size=2)
def test_each_mesh_has_its_own_ledger() -> None:
    one, other = Mesh(), Mesh()
    one["dp"].allreduce(np.ones(1))
    assert one.ledger.snapshot().keys() == {"dp"}
    assert other.ledger.snapshot() == {}
