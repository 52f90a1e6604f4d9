"""Every operation of an axis against NumPy, alone and among all ranks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml.comm import Axis, Mesh, window
from hpcml.comm.tags import Tag
from hpcml.kernels import compiled

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", ml_dtypes.bfloat16, "float32", "float64"]
NUMBERS = [np.dtype(name) for name in [*INTEGERS, *FLOATS]]
MOVED = [*NUMBERS, np.dtype(bool)]
COMBINE = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}

cases = pytest.mark.parametrize
all_moved = cases("dtype", MOVED, ids=str)
all_numbers = cases("dtype", NUMBERS, ids=str)


def contribution(rank: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What a rank contributes: known to all ranks, different on each, no overflow in int8."""
    values = np.random.default_rng(17 + rank).integers(0, 4, shape)
    if np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16":
        return np.asarray((values + 1) * 0.37, dtype)
    return np.asarray(values, dtype)


def combined(inputs: list[np.ndarray], op: str) -> np.ndarray:
    """The reduction in the order of the ranks: 16-bit floats in float32, rounded once."""
    half = inputs[0].dtype.name in ("float16", "bfloat16")
    total = inputs[0].astype(np.float32 if half else inputs[0].dtype)
    for other in inputs[1:]:
        total = COMBINE[op](total, other.astype(total.dtype))
    return np.asarray(total, inputs[0].dtype)


def assert_reduced(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, except where MPI chooses the order of float additions."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype in (np.float32, np.float64):
        np.testing.assert_allclose(found, expected, rtol=8 * np.finfo(found.dtype).eps)
    else:
        assert found.tobytes() == expected.tobytes()


def assert_moved(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@all_numbers
@cases("op", COMBINE)
@cases("shape", [(), (1,), (5, 3), (0, 3)], ids=str)
def test_allreduce(axis: Axis, dtype: np.dtype[Any], op: str, shape: tuple[int, ...]) -> None:
    inputs = [contribution(rank, shape, dtype) for rank in range(axis.size)]
    mine = inputs[axis.rank]
    expected = combined(inputs, op)
    result = axis.allreduce(mine, op)
    assert_reduced(result, expected)
    assert_moved(mine, contribution(axis.rank, shape, dtype))
    assert not np.may_share_memory(result, mine) or not mine.size

    out = axis.empty(shape, dtype)
    assert axis.allreduce(mine, op, out=out) is out
    assert_reduced(out, expected)

    assert axis.allreduce(mine, op, out=mine) is mine
    assert_reduced(mine, expected)


@all_numbers
@cases("op", COMBINE)
def test_reduce(axis: Axis, dtype: np.dtype[Any], op: str) -> None:
    root = axis.size - 1
    inputs = [contribution(rank, (5, 3), dtype) for rank in range(axis.size)]
    mine = inputs[axis.rank]
    result = axis.reduce(mine, op, root=root)
    in_place = axis.reduce(mine, op, root=root, out=mine)
    if axis.rank == root:
        assert in_place is mine
        for found in (result, mine):
            assert_reduced(found, combined([*inputs[:root], contribution(root, (5, 3), dtype)], op))
    else:
        assert result is None and in_place is None
        assert_moved(mine, contribution(axis.rank, (5, 3), dtype))


@all_numbers
@cases("op", COMBINE)
@cases("rows", [0, 1, 3])
def test_reduce_scatter(axis: Axis, dtype: np.dtype[Any], op: str, rows: int) -> None:
    inputs = [contribution(rank, (axis.size * rows, 2), dtype) for rank in range(axis.size)]
    block = slice(axis.rank * rows, (axis.rank + 1) * rows)
    expected = combined(inputs, op)[block]
    assert_reduced(axis.reduce_scatter(inputs[axis.rank], op), expected)
    out = np.empty((rows, 2), dtype)
    assert axis.reduce_scatter(inputs[axis.rank], op, out=out) is out
    assert_reduced(out, expected)
    own = inputs[axis.rank][block]
    axis.reduce_scatter(inputs[axis.rank], op, out=own)
    assert_reduced(own, expected)


@all_moved
@cases("rows", [0, 1, 3])
def test_allgather(axis: Axis, dtype: np.dtype[Any], rows: int) -> None:
    inputs = [contribution(rank, (rows, 2), dtype) for rank in range(axis.size)]
    expected = np.concatenate(inputs)
    assert_moved(axis.allgather(inputs[axis.rank]), expected)
    out = np.zeros_like(expected)
    assert axis.allgather(inputs[axis.rank], out=out) is out
    assert_moved(out, expected)


@all_moved
def test_allgather_from_a_block_of_the_result(axis: Axis, dtype: np.dtype[Any]) -> None:
    inputs = [contribution(rank, (3, 2), dtype) for rank in range(axis.size)]
    for block in {axis.rank, (axis.rank + 1) % axis.size}:
        out = np.zeros((3 * axis.size, 2), dtype)
        source = out[3 * block : 3 * block + 3]
        source[...] = inputs[axis.rank]
        axis.allgather(source, out=out)
        assert_moved(out, np.concatenate(inputs))


@all_moved
def test_gather(axis: Axis, dtype: np.dtype[Any]) -> None:
    root = axis.size - 1
    inputs = [contribution(rank, (3, 2), dtype) for rank in range(axis.size)]
    result = axis.gather(inputs[axis.rank], root=root)
    out = np.zeros((3 * axis.size, 2), dtype)
    source = out[3 * axis.rank : 3 * axis.rank + 3]
    source[...] = inputs[axis.rank]
    written = axis.gather(source, root=root, out=out)
    if axis.rank == root:
        assert written is out
        assert_moved(result, np.concatenate(inputs))
        assert_moved(out, np.concatenate(inputs))
    else:
        assert result is None and written is None


@all_moved
def test_scatter(axis: Axis, dtype: np.dtype[Any]) -> None:
    root = axis.size - 1
    whole = contribution(99, (3 * axis.size, 2), dtype)
    mine = whole.copy() if axis.rank == root else np.zeros_like(whole)
    expected = whole[3 * axis.rank : 3 * axis.rank + 3]
    assert_moved(axis.scatter(mine, root=root), expected)
    own = mine[3 * axis.rank : 3 * axis.rank + 3]
    assert axis.scatter(mine, root=root, out=own) is own
    assert_moved(own, expected)


@all_moved
@cases("shape", [(), (5, 3), (0,)], ids=str)
def test_broadcast(axis: Axis, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    for root in range(axis.size):
        mine = contribution(axis.rank, shape, dtype)
        expected = contribution(root, shape, dtype)
        assert_moved(axis.broadcast(mine, root), expected)
        assert_moved(mine, contribution(axis.rank, shape, dtype))
        assert axis.broadcast(mine, root, out=mine) is mine
        assert_moved(mine, expected)


@all_moved
def test_alltoall(axis: Axis, dtype: np.dtype[Any]) -> None:
    inputs = [contribution(rank, (axis.size * 2, 3), dtype) for rank in range(axis.size)]
    expected = np.concatenate([x[2 * axis.rank : 2 * axis.rank + 2] for x in inputs])
    mine = inputs[axis.rank]
    assert_moved(axis.alltoall(mine), expected)
    assert axis.alltoall(mine, out=mine) is mine
    assert_moved(mine, expected)


@all_moved
@cases("shape", [(), (4, 3), (0,)], ids=str)
def test_send_and_recv_around_the_ring(
    axis: Axis, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    out = np.empty(shape, dtype)
    # The first rank receives last, so that no rank relies on the library's buffers.
    if axis.rank == 0:
        axis.send(contribution(axis.rank, shape, dtype), after)
        assert axis.recv(out, before) is out
    else:
        axis.recv(out, before)
        axis.send(contribution(axis.rank, shape, dtype), after)
    assert_moved(out, contribution(before, shape, dtype))


def test_messages_to_oneself_keep_their_order_and_tags(axis: Axis) -> None:
    out = np.empty(2, np.int32)
    for value, tag in ((1, Tag.MESSAGE), (2, 7), (3, Tag.MESSAGE)):
        axis.send(np.full(2, value, np.int32), axis.rank, tag)
    found = [int(axis.recv(out, axis.rank, tag)[0]) for tag in (7, Tag.MESSAGE, Tag.MESSAGE)]
    assert found == [2, 1, 3]
    with pytest.raises(ValueError, match=r"receives from itself .* what it never sent"):
        axis.recv(out, axis.rank)


@pytest.mark.mpi(min_size=2)
def test_a_message_of_another_length_is_an_error() -> None:
    axis = Mesh()["dp"]
    if axis.rank == 0:
        axis.send(np.zeros(3, np.float32), 1)
    elif axis.rank == 1:
        with pytest.raises(ValueError, match=r"of 12 bytes came from rank 0 .* of 20 bytes"):
            axis.recv(np.zeros(5, np.float32), 0)
    axis.barrier()


def test_input_that_is_not_contiguous_is_copied(axis: Axis) -> None:
    base = [contribution(rank, (6, 4 * axis.size), np.dtype("f4")) for rank in range(axis.size)]
    inputs = [x.T[::2] for x in base]
    mine = inputs[axis.rank]
    assert not mine.flags.c_contiguous
    assert_reduced(axis.allreduce(mine), combined(inputs, "sum"))
    assert_moved(axis.allgather(mine), np.concatenate(inputs))
    assert_moved(axis.broadcast(mine), inputs[0].copy())
    assert axis.alltoall(mine).shape == mine.shape
    halves = [x.astype(np.float16).T for x in inputs]
    assert_reduced(axis.allreduce(halves[axis.rank]), combined(halves, "sum"))


def test_input_that_overlaps_the_result_is_read_before_it_is_overwritten(axis: Axis) -> None:
    memory = np.arange(10, dtype=np.int64)
    axis.allreduce(memory[:8], out=memory[2:])
    assert memory.tolist() == [0, 1, *(axis.size * np.arange(8)).tolist()]


def test_read_only_input_is_fine(axis: Axis) -> None:
    x = np.ones(4, np.float32)
    x.flags.writeable = False
    assert axis.allreduce(x).tolist() == [axis.size] * 4
    assert axis.broadcast(x).tolist() == [1] * 4


@cases("op", COMBINE)
def test_16_bit_sums_are_rounded_once(axis: Axis, op: str) -> None:
    """1 + 2^-8 + 2^-8 + ... in bfloat16: added at 16 bits each small term would be lost."""
    tiny = np.dtype(ml_dtypes.bfloat16).type(2**-8)
    x = np.full(3, 1 if axis.rank == 0 else tiny, ml_dtypes.bfloat16)
    inputs = [np.full(3, 1 if r == 0 else tiny, ml_dtypes.bfloat16) for r in range(axis.size)]
    result = axis.allreduce(x, op)
    assert_moved(result, combined(inputs, op))
    if op == "sum" and axis.size > 2:
        assert float(result[0]) > 1


def test_16_bit_sums_overflow_to_infinity_without_a_warning(axis: Axis) -> None:
    result = axis.allreduce(np.full(3, 60000, np.float16))
    assert np.isinf(result).all() == (axis.size > 1)


def test_all_ranks_get_the_same_bits(axis: Axis) -> None:
    x = np.random.default_rng(axis.rank).standard_normal(1001)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        sums = axis.allgather_object(axis.allreduce(x.astype(dtype)).tobytes())
        assert len(set(sums)) == 1


def test_python_values(axis: Axis) -> None:
    assert axis.allgather_object("x" * axis.rank) == ["x" * rank for rank in range(axis.size)]
    for root in range(axis.size):
        assert axis.broadcast_object({"rank": axis.rank}, root) == {"rank": root}
    axis.barrier()


def test_a_subclass_of_arrays_is_taken_as_one(axis: Axis) -> None:
    x = np.ones((2, 3), np.float32).view(np.matrix)
    out = np.empty((2, 3), np.float32).view(np.matrix)
    for _ in range(2):
        assert axis.allreduce(x, out=out) is out
        assert out.tolist() == [[axis.size] * 3] * 2


def test_a_result_that_has_become_read_only_is_refused(axis: Axis) -> None:
    x, out = np.ones(3, np.float32), np.empty(3, np.float32)
    axis.allreduce(x, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="is read-only"):
        axis.allreduce(x, out=out)


@pytest.mark.mpi(min_size=2)
def test_kernels_are_loaded_before_the_wait_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compile them may take longer than a rank waits for others."""
    axis, waits = Mesh()["dp"], []
    if not axis.shares_memory:
        pytest.skip("the ranks cannot share memory")

    def load(dtype: str) -> Any:
        waits.append(axis.transport.board.waiting())  # type: ignore[attr-defined]
        return compiled(dtype)

    monkeypatch.setattr(window, "compiled", load)
    assert axis.allreduce(np.ones(3), algorithm="staged").tolist() == [axis.size] * 3
    assert waits == [None]


def refusals(axis: Axis) -> list[tuple[Any, str]]:
    x = np.ones((2 * axis.size, 2), np.float32)
    strided = np.ones((2 * axis.size, 4), np.float32)[:, ::2]
    fixed = x.copy()
    fixed.flags.writeable = False
    calls: list[tuple[Any, str]] = [
        (lambda: axis.allreduce(x.astype(complex)), "dtype complex128 cannot be communicated"),
        (lambda: axis.allreduce(x.astype(">f4")), "dtype >f4 cannot be communicated"),
        (lambda: axis.broadcast(x.astype("M8[s]")), "cannot be communicated: convert to one of"),
        (lambda: axis.allreduce(x > 0), r"bool has no sum: reduce x.view\('uint8'\)"),
        (lambda: axis.allreduce(x, "mean"), "op='mean' is not one of sum, prod, min, max"),
        (lambda: axis.allreduce(x, out=x[:1]), r"out has shape \(1, 2\), but the result has"),
        (lambda: axis.allreduce(x, out=x.astype("f8")), "out has dtype float64, but the input"),
        (lambda: axis.allreduce(x, out=strided), "strides .* is not C-contiguous"),
        (lambda: axis.allreduce(strided, out=strided), "strides .* is not C-contiguous"),
        (lambda: axis.recv(strided, 0), "strides .* is not C-contiguous"),
        (lambda: axis.allreduce(x, out=fixed), "is read-only"),
        (lambda: axis.allgather(x[0, 0].reshape(())), "allgather joins along dim 0"),
        (lambda: axis.reduce_scatter(x[0, 0].reshape(())), "reduce_scatter cuts dim 0"),
        (lambda: axis.broadcast(x, root=axis.size), "root=.* is outside the axis"),
        (lambda: axis.send(x, -1), "dest=-1 is outside the axis"),
        (lambda: axis.recv(x, axis.size), "source=.* is outside the axis"),
        (lambda: axis.gather(x, root=-1), "root=-1 is outside"),
    ]
    if axis.size > 1:
        one = x[:1]
        calls += [
            (lambda: axis.alltoall(one), "alltoall over .* pad it from 1 to"),
            (lambda: axis.scatter(one), "scatter over .* pad it from 1 to"),
            (lambda: axis.reduce_scatter(one), "reduce_scatter over .* pad it from 1 to"),
        ]
    return calls


def test_bad_arguments_are_refused_before_anything_is_sent(axis: Axis) -> None:
    before = axis.ledger.snapshot()
    for call, message in refusals(axis):
        with pytest.raises(ValueError, match=message):
            call()
    scalar = np.float32(1)
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array"):
        axis.allreduce(scalar, out=scalar)
    for nothing in (3.0, [1, 2], None):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array"):
            axis.allreduce(nothing)
    assert not axis.ledger.snapshot() - before
