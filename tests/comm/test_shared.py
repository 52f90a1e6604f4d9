"""Collectives in memory that ranks share: values, bits, what it costs, and what happens without."""

from __future__ import annotations

import gc
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml import memory
from hpcml.comm import Axis, Mesh
from hpcml.comm.shared import FOLDER
from hpcml.comm.transport import Node
from hpcml.comm.window import Window
from hpcml.comm.world import MpiTransport
from tests.comm.jobs import child_environment, mpiexec

Array = np.ndarray[Any, Any]
COMBINE = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int16)]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_size = pytest.mark.parametrize("size", [1, 7, 64, 1000, 100_003])


@pytest.fixture(scope="module")
def axis() -> Axis:
    return Mesh()["dp"]


def given(rank: int, shape: Any, dtype: np.dtype[Any]) -> Array:
    return (np.random.default_rng(rank).normal(size=shape) * 10).astype(dtype)


def combined(parts: list[Array], op: str = "sum", stepwise: bool = False) -> Array:
    """In the order given; 16-bit floats in float32, rounded at the end or after every step."""
    dtype = parts[0].dtype
    wide = np.dtype(np.float32) if dtype.itemsize == 2 and dtype.kind != "i" else dtype
    total = parts[0].astype(wide)
    with np.errstate(over="ignore"):
        for part in parts[1:]:
            total = COMBINE[op](total, part.astype(wide))
            if stepwise:
                total = total.astype(dtype).astype(wide)
        return total.astype(dtype)


@pytest.mark.mpi
@every_type
@every_size
@pytest.mark.parametrize("op", COMBINE)
def test_allreduce_in_place(axis: Axis, dtype: np.dtype[Any], size: int, op: str) -> None:
    x = axis.empty(size + 3, dtype)[3:]
    parts = [given(rank, size, dtype) for rank in range(axis.size)]
    x[...] = parts[axis.rank]
    assert axis.allreduce(x, op, out=x, algorithm="window" if axis.size > 1 else None) is x
    assert x.tobytes() == combined(parts, op).tobytes()
    axis.allreduce(parts[axis.rank], op, out=x)  # from elsewhere into shared memory
    assert x.tobytes() == combined(parts, op).tobytes()


@pytest.mark.mpi
@every_type
@every_size
def test_reduce_scatter(axis: Axis, dtype: np.dtype[Any], size: int) -> None:
    whole = axis.empty((axis.size, size), dtype)
    parts = [given(rank, (axis.size, size), dtype) for rank in range(axis.size)]
    expected = combined([part[axis.rank] for part in parts])
    whole[...] = parts[axis.rank]
    assert axis.reduce_scatter(whole)[0].tobytes() == expected.tobytes()
    home = whole[axis.rank : axis.rank + 1]
    assert axis.reduce_scatter(whole, out=home) is home
    assert home[0].tobytes() == expected.tobytes()
    axis.barrier()  # the others' rows of this rank must have stayed
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    assert whole[others].tobytes() == parts[axis.rank][others].tobytes()


@pytest.mark.mpi
@every_type
def test_uneven_counts(axis: Axis, dtype: np.dtype[Any]) -> None:
    counts = [3 * rank for rank in range(axis.size)]
    start = sum(counts[: axis.rank])
    mine = slice(start, start + counts[axis.rank])
    parts = [given(rank, (sum(counts), 5), dtype) for rank in range(axis.size)]
    x = axis.empty((sum(counts), 5), dtype)
    x[...] = parts[axis.rank]
    found = axis.reduce_scatter(x, counts=counts)
    assert found.tobytes() == combined(parts)[mine].tobytes()
    axis.allgather(found, out=x, counts=counts)
    assert x.tobytes() == combined(parts).tobytes()


@pytest.mark.mpi
@every_type
@every_size
def test_allgather_and_broadcast(axis: Axis, dtype: np.dtype[Any], size: int) -> None:
    out = axis.empty((axis.size, size), dtype)
    parts = np.stack([given(rank, size, dtype) for rank in range(axis.size)])
    axis.allgather(parts[axis.rank : axis.rank + 1], out=out)
    assert out.tobytes() == parts.tobytes()
    out[...] = 0
    axis.barrier()
    out[axis.rank] = parts[axis.rank]
    axis.allgather(out[axis.rank : axis.rank + 1], out=out)  # each already at its place
    assert out.tobytes() == parts.tobytes()
    out[...] = axis.rank
    axis.broadcast(out, root=axis.size - 1, out=out)
    assert (out == axis.size - 1).all()


@pytest.mark.mpi
@every_type
@pytest.mark.parametrize("shared", [False, True])
def test_deterministic_accumulation_is_the_serial_one(dtype: np.dtype[Any], shared: bool) -> None:
    """Two rounds of contributions: the bits of adding them all one after the other."""
    axis = Mesh(deterministic=True)["dp"]
    parts = [given(number, 1001, dtype) for number in range(2 * axis.size + 1)]
    expected = combined(parts, stepwise=True)
    total, x = (axis.empty(1001, dtype) if shared else np.empty(1001, dtype) for _ in range(2))
    total[...] = parts[0]
    owned = np.array_split(np.arange(1001 // axis.size * axis.size), axis.size)[axis.rank]
    block = parts[0][owned].copy()
    for turn in range(2):
        x[...] = parts[1 + turn * axis.size + axis.rank]
        axis.reduce_scatter(x[: owned.size * axis.size], out=block, accumulate=True)
        axis.allreduce(x, out=total, accumulate=True)
    assert total.tobytes() == expected.tobytes()
    assert block.tobytes() == expected[owned].tobytes()


@pytest.mark.mpi
def test_the_background_uses_the_same_memory(axis: Axis) -> None:
    x, y = axis.empty(5000), axis.empty(5000)
    x[...], y[...] = 1 + axis.rank, 10
    request = axis.iallreduce(x, out=x)
    axis.allreduce(y, out=y)
    request.wait()
    assert (x == axis.size * (axis.size + 1) / 2).all()
    assert (y == 10 * axis.size).all()


@pytest.mark.mpi(min_size=2)
def test_bytes_counted(axis: Axis) -> None:
    x = axis.empty(64 * axis.size * 3)
    x[...] = 1
    before = axis.ledger.snapshot()
    axis.allreduce(x, out=x)
    count = (axis.ledger.snapshot() - before)["dp"]["all_reduce"]
    assert count.bytes == x.nbytes
    assert count.bytes_sent == x.nbytes // axis.size * (axis.size - 1)
    assert count.bytes_off_node == 0


@pytest.mark.mpi
def test_memory_is_counted_and_given_back(axis: Axis) -> None:
    gc.collect()
    before = memory.account().live["grads"]
    x = axis.empty((1000, 3), np.float64, "grads")
    assert memory.account().live["grads"] == before + 24_000
    assert isinstance(memory.owner_of(x), Window) == (axis.size > 1)
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    names = [line for line in mapped if f"{FOLDER}/hpcml-" in line]
    assert all(line.endswith("(deleted)") for line in names)  # nothing for a killed job to leave
    assert names or axis.size == 1
    view = x[10:20, 1]
    del x
    assert memory.account().live["grads"] == before + 24_000
    del view
    assert memory.account().live["grads"] == before


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["count", "op", "place", "operation"])
def test_calls_that_differ_are_an_error_on_all_ranks(what: str) -> None:
    axis = Mesh()["dp"]  # flags of its own: these calls leave them apart
    x = axis.empty(100)
    first = axis.rank == 0
    part = {"count": x[: 50 if first else 60], "place": x[:50] if first else x[50:]}.get(what, x)
    op = "max" if what == "op" and first else "sum"
    call = partial(axis.allreduce, part, op, out=part)
    if what == "operation" and first:
        call = partial(axis.broadcast, part, out=part)
    with pytest.raises(ValueError, match="same operation on the same place") as caught:
        call()
    for rank in range(axis.size):
        assert f"rank {rank} calls" in str(caught.value)


@pytest.mark.mpi(min_size=2)
def test_different_sizes_are_an_error_on_all_ranks(axis: Axis) -> None:
    with pytest.raises(ValueError, match="the same memory on all ranks"):
        axis.empty(100 + axis.rank)


@pytest.mark.mpi(min_size=2)
def test_naming_the_window_without_one(axis: Axis) -> None:
    with pytest.raises(ValueError, match=r"needs an array of Axis\.empty"):
        axis.allreduce(np.ones(3), algorithm="window")


NO_ROOM = """
import logging, numpy as np, hpcml
logging.basicConfig(format="%(message)s")
axis = hpcml.Mesh()["dp"]
for size in (1 << 14, 1 << 22, 1 << 14):
    x = axis.empty(size)
    x[...] = 1 + axis.rank
    axis.allreduce(x, out=x)
    assert (x == axis.size * (axis.size + 1) / 2).all()
print("well", flush=True)
"""


def test_no_room_to_share(tmp_path: Any) -> None:
    """A small /dev/shm, as containers have it: says so once and goes by messages."""
    mount = f"mount -t tmpfs -o size=12m tmpfs {FOLDER}"
    command = f"{mount} && exec {mpiexec()} -n 2 {sys.executable} -c '{NO_ROOM}'"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100,
        env=child_environment(),
    )  # fmt: skip
    if "Operation not permitted" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip("needs the right to mount a small /dev/shm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("well") == 2
    assert done.stderr.count("no shared memory for collectives") == 1
    assert "MiB" in done.stderr


@pytest.mark.mpi(min_size=2)
def test_streams_do_not_share_their_plans(axis: Axis) -> None:
    """An array that was reduced in the background first, then beside it in the foreground."""
    first, second = axis.empty(200_000), axis.empty(200_000)
    first[...], second[...] = 1, 1
    expected = 1.0
    for turn in range(4):
        expected *= axis.size
        request = axis.iallreduce(first, out=first)
        if turn % 2:
            axis.allreduce(second, out=second)
        else:
            axis.iallreduce(second, out=second).wait()
        request.wait()
        assert (first == expected).all() and (second == expected).all()


@pytest.mark.mpi
@pytest.mark.parametrize("first", [0, 1])
def test_a_result_in_other_rows_of_the_input(axis: Axis, first: int) -> None:
    """Which rows are a rank's own must not decide the way: ranks would go different ones."""
    x = axis.empty((axis.size + 1, 7))[: axis.size]
    parts = [given(rank, x.shape, x.dtype) for rank in range(axis.size)]
    x[...] = parts[axis.rank]
    row = min(first, axis.size - 1)
    out = x[row : row + 1]
    for _ in range(2):
        x[...] = parts[axis.rank]
        axis.barrier()
        assert axis.reduce_scatter(x, out=out) is out
        assert out[0].tobytes() == combined([part[axis.rank] for part in parts]).tobytes()
        axis.barrier()


@pytest.mark.mpi
def test_views_that_do_not_begin_at_an_element(axis: Axis) -> None:
    whole = axis.empty(64)
    view = whole[1:11].view(np.float64)
    view[...] = np.arange(5) + axis.rank
    expected = axis.size * (np.arange(5) + (axis.size - 1) / 2)
    assert (axis.allreduce(view) == expected).all()
    with pytest.raises(ValueError, match="begins within an element"):
        axis.allreduce(view, out=view)


@pytest.mark.mpi(min_size=2)
def test_after_calls_that_differed_no_sum_is_trusted() -> None:
    axis = Mesh()["dp"]
    x = axis.empty(100)
    part = x[: 50 if axis.rank else 60]
    for _ in range(3):
        with pytest.raises(ValueError, match="same operation on the same place"):
            axis.allreduce(part, out=part)
    with pytest.raises(ValueError, match="same operation on the same place"):
        axis.allreduce(x, out=x)


@pytest.mark.mpi
def test_an_array_that_changed_its_form_is_looked_at_again(axis: Axis) -> None:
    x, out = np.ones((2, 6)), np.empty((2, 6))
    axis.allreduce(x, out=out)
    out = out.reshape(6, 2)
    with pytest.raises(ValueError, match="out has shape"):
        axis.allreduce(x, out=out)


@pytest.mark.mpi(min_size=3)
@every_type
@pytest.mark.parametrize("shared", [False, True])
def test_over_several_nodes(
    monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[Any], shared: bool
) -> None:
    """Ranks 0 and 1 on one node, the others on further ones, as far as the axis knows."""
    places = MpiTransport.nodes

    def pretended(self: MpiTransport) -> tuple[Node, ...]:
        real = places(self)
        index = [member // 2 for member in self.members]
        local = [index[:rank].count(node) for rank, node in enumerate(index)]
        return tuple(
            Node(place.host, node, mine, index.count(node))
            for place, node, mine in zip(real, index, local, strict=True)
        )

    monkeypatch.setattr(MpiTransport, "nodes", pretended)
    axis = Mesh()["dp"]
    parts = [given(rank, 1001, dtype) for rank in range(axis.size)]
    x, total = (axis.empty(1001, dtype) if shared else np.empty(1001, dtype) for _ in range(2))
    x[...], total[...] = parts[axis.rank], 3
    axis.allreduce(x, out=total, accumulate=True)
    exact = sum(part.astype(np.float64) for part in parts)
    bound = {np.float32: 1e-4, np.int16: 0}.get(dtype.type, 1e-9 if dtype == np.float64 else 0.5)
    np.testing.assert_allclose(total.astype(np.float64), exact + 3, atol=bound)
    axis.allreduce(x, out=x)
    np.testing.assert_allclose(x.astype(np.float64), exact, atol=bound)
    if dtype.itemsize == 2:  # rounded once, in the order of the ranks, wherever it lies
        assert x.tobytes() == combined(parts).tobytes()
