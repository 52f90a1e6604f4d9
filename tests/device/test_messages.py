"""Collectives, messages and halos of a GPU's arrays: given to MPI as they are, and by the host."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml import Tensor, memory
from hpcml.backend import to_kind
from hpcml.comm import Axis, Mesh, staging
from hpcml.comm.algorithms import algorithms, turns
from hpcml.comm.direct import VARIABLE
from hpcml.comm.faults import Synchronous
from hpcml.comm.halo_plan import Line
from hpcml.comm.sanitizer import MismatchError
from hpcml.comm.threads import run
from tests.comm import test_halo
from tests.comm.algorithms.conformance import Case, check, everywhere, layouts, random_case
from tests.comm.algorithms.properties import ROUNDED, check_order
from tests.device import emulator, test_training
from tests.device.standin import streams
from tests.test_collectives import COTANGENT, ROWS, inner, vectors


@pytest.fixture(params=["device", "staged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of messages, of which none has more than three numbers of 8 bytes.

    Reductions combine twice as many at once.
    """
    monkeypatch.setenv(VARIABLE, request.param)
    monkeypatch.setattr(staging, "CHUNK", 24)
    monkeypatch.setattr(turns, "DEVICE_PIECE", 48)
    return str(request.param)


OnRanks = Callable[..., list[Any]]


@pytest.fixture(params=[1, 2, 3, 4, pytest.param("mpi", marks=pytest.mark.mpi)])
def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
    """Run `program(*arguments)` on so many threads, or on the ranks of mpiexec."""

    def start(program: Callable[..., Any], *arguments: Any) -> list[Any]:
        if request.param == "mpi":
            return [program(*arguments)]
        return run(program, *arguments, ranks=request.param, timeout=30)

    return start


@pytest.mark.parametrize(("operation", "name", "size"), everywhere(3, 4))
def test_every_algorithm(operation: str, name: str, size: int, way: str, device: Any) -> None:
    random = Random(f"{operation} {name} {size}")
    nodes = random.choice(layouts(operation, name, size))
    cases = [random_case(operation, size, random) for _ in range(3)]
    mode = random.choice([False, True])

    def program() -> None:
        axis = Mesh(deterministic=mode)["dp"]
        for case in cases:
            check(axis, name, case, device)

    run(program, ranks=size, nodes=nodes, timeout=30)


@pytest.mark.mpi
@pytest.mark.parametrize("operation", ["allreduce", "reduce_scatter", "allgather", "alltoall"])
def test_algorithms_between_processes(operation: str, way: str, device: Any) -> None:
    """The memory of the stand-in is the host's, so that every MPI takes it."""
    axis, random = Mesh()["dp"], Random(5)
    for name, known in algorithms(operation).items():
        if known.applies.__name__ == "_always":
            for _ in range(3):
                check(axis, name, random_case(operation, axis.size, random), device)


@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_have_the_bits_of_those_on_the_host(
    deterministic: bool, way: str, on_ranks: OnRanks, device: Any
) -> None:
    def program() -> None:
        axis = Mesh(deterministic=deterministic)["dp"]
        for dtype in ROUNDED:
            for operation in ("allreduce", "reduce_scatter", "reduce"):
                case = Case(operation, tuple(range(5, 5 + axis.size)), dtype, accumulate=True)
                check_order(axis, "ordered" if axis.size > 1 else None, case, device)

    on_ranks(program)


def test_collectives_and_their_adjoints(way: str, on_ranks: OnRanks, device: Any) -> None:
    """<F x, y> = <x, F* y> with the values that the collective should give."""

    def program() -> None:
        axis = Mesh()["dp"]
        for row in ROWS.values():
            xs = vectors(row.source, row.shape(axis), axis, 5, np.float64)
            x = Tensor(device.asarray(xs[axis.rank]), True)
            out = row.call(x * 1, axis)
            found = to_kind(out.data, "cpu")
            np.testing.assert_array_equal(found, row.result(xs, axis)[axis.rank])
            y = vectors(COTANGENT[row.to], out.shape, axis, 50, np.float64)[axis.rank]
            out.backward(device.asarray(y))
            gradient = to_kind(x.gradient, "cpu")
            left = inner(found, y, row.to, axis)
            assert left == inner(xs[axis.rank], gradient, row.source, axis)

    on_ranks(program)


HALOS = (
    test_halo.Case((Line((3, 2), ((1, 2),) * 2, periodic=True),), (0,), tail=(2,)),
    test_halo.Case((Line((2, 0, 3), ((4, 1), (0, 2), (1, 1))),), (0,), lead=(2,)),
    test_halo.Case((Line((2, 3), ((1, 1),) * 2), Line((4, 1), ((2, 1),) * 2)), (1, 0)),
)


@pytest.mark.parametrize("case", HALOS, ids=["2 ranks", "3 ranks", "4 ranks"])
def test_halos(case: test_halo.Case, way: str, device: Any) -> None:
    """Values, adjoints and what the ledger counts, as for arrays of the host."""
    run(test_halo.check, case, None, device, ranks=case.ranks, timeout=30)


def test_messages_and_what_goes_on_beside(way: str, on_ranks: OnRanks, device: Any) -> None:
    def program() -> None:
        axis = Mesh()["dp"]
        to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        x = device.full((3, 7), axis.rank + 1.0)
        got = [device.empty((3, 7)) for _ in range(3)]
        sent = [axis.isend(x.T.T, to), axis.isend(2 * x, to)]
        requests = [axis.irecv(out, source) for out in got[:2]]
        while not all(request.test() for request in requests):
            pass
        total = axis.iallreduce(x, out=got[2])
        again = axis.iallreduce(x)
        for request in (*sent, total, again):
            request.wait()
        sums = axis.size * (axis.size + 1) / 2
        expected = source + 1, 2 * source + 2, sums, sums
        for out, value in zip((*got, again.wait()), expected, strict=True):
            assert isinstance(out, device.ndarray) and (out == value).all()

    on_ranks(program)


def test_copies_and_waits_are_counted(way: str, standing_in: Any) -> None:
    """Staged: a copy each way for a chunk. Direct: none, and a wait before each call of MPI."""

    def program() -> tuple[int, int, int]:
        axis = Mesh()["dp"]
        x = standing_in.ones(10)  # 80 bytes: 4 chunks
        axis.barrier()
        before = streams.here()
        axis.allreduce(x, out=x, algorithm="recursive_doubling")
        spent = streams.here() - before
        # Threads wait for the whole device after copying from one rank to the other, MPI does not.
        return spent["to host"], spent["from host"], spent["syncs"] - spent["whole device"]

    # Staged, the host waits for each chunk that it sends, and for all that it has received.
    expected = (4, 4, 4 + 1) if way == "staged" else (0, 0, 2)
    assert run(program, ranks=2, faults=[Synchronous()]) == [expected] * 2


def test_the_ledger_counts_as_on_the_host(way: str, device: Any) -> None:
    def program() -> None:
        mesh = Mesh()
        counts = []
        for module in (np, device):
            before = mesh.ledger.snapshot()
            for name in ("ring", "rabenseifner", "ordered"):
                mesh["dp"].allreduce(module.ones(13), algorithm=name)
            mesh["dp"].reduce_scatter(module.ones(6), algorithm="pairwise")
            mesh["dp"].isend(module.ones(5), (mesh.rank + 1) % 3).wait()
            mesh["dp"].recv(module.ones(5), (mesh.rank - 1) % 3)
            counts.append((mesh.ledger.snapshot() - before).plain())
        assert counts[0] == counts[1] and counts[0]["dp"]["all_reduce"]["calls"] == 3

    run(program, ranks=3, timeout=30)


@pytest.mark.parametrize(("how", "pinned"), [("device", 0), ("staged", 16_000)])
def test_scratch_is_counted_among_buffers(
    how: str, pinned: int, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background too; and the pinned memory of a message that comes and one that goes."""
    monkeypatch.setenv(VARIABLE, how)

    def program() -> list[int]:
        axis, account = Mesh()["dp"], memory.account()
        x, found = device.ones(1000), []
        for reduce in (axis.allreduce, axis.iallreduce):
            account.reset_peak()
            made = reduce(x, out=x, algorithm="recursive_doubling")
            if made is not x:
                made.wait()
            found.append(account.peak["buffers"] - account.live["buffers"])
            assert account.live["buffers"] == 0
        return found

    assert run(program, ranks=2) == [[8000 + pinned] * 2] * 2


def test_arrays_of_the_host_and_of_a_gpu_do_not_mix(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = Axis("solo")
    with pytest.raises(ValueError, match="x is on a GPU, but out is on the host: pass both on one"):
        axis.allreduce(device.ones(3), out=np.ones(3))
    with pytest.raises(ValueError, match="is not C-contiguous"):
        axis.allreduce(device.ones((2, 3)), out=device.ones((3, 2)).T)
    monkeypatch.setenv("HPCML_DEBUG", "comm")

    def program() -> None:
        axis = Mesh()["dp"]
        axis.allreduce(np.ones(3) if axis.rank else device.ones(3))

    with pytest.raises(MismatchError, match=r"(?s)rank 0: .*GPU messages.*rank 1: allreduce"):
        run(program, ranks=2, timeout=30)


def test_16_bits_are_added_in_float32(device: Any) -> None:
    def program() -> Any:
        x = device.full(5, 257, ml_dtypes.bfloat16)
        return Mesh()["dp"].allreduce(x).tolist()

    assert run(program, ranks=3) == [[768.0] * 5] * 3


ORDERED = {"deterministic": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"ranks": 2, "mesh": {"tp": 2}, "sequence_parallel": True},
    "pp": {"ranks": 2, "mesh": {"pp": 2}, "schedule": "1f1b"},
    "beside": {"ranks": 3, "zero": 3, "overlap": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_by_way_of_the_host(
    layout: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "staged")
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))
    found = test_training.trained("cuda", "float64", **LAYOUTS[layout])
    test_training.same(found, "float64", 1e-10)


@pytest.mark.parametrize("way", ["staged"], indirect=True)
def test_deterministic_steps_have_the_bits_of_one_rank(
    way: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))
    runs = [
        test_training.trained("cuda", "bfloat16", ranks, zero=1, mesh={"dp": ranks, **ORDERED})
        for ranks in (1, 3)
    ]
    assert runs[0][0] == runs[1][0]
    for name, values in runs[0][1].items():
        assert values.tobytes() == runs[1][1][name].tobytes(), name
