"""What every collective algorithm must do, whoever wrote it: checks over the registry.

Each check is called by all ranks of an axis with the name of an algorithm and raises on any of them
if it fails. `registered()` lists what there is to check. Inputs are known to all ranks, so each can
work out what it must get. In `check` they are small whole numbers, which no order of additions
rounds: results are compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml.backend import to_kind
from hpcml.comm import Axis
from hpcml.comm.algorithms import OPERATIONS, Situation, algorithms

REDUCTIONS = ("allreduce", "reduce_scatter", "reduce")
CUT = ("reduce_scatter", "scatter")
"""Operations that give a block of their input."""
JOINED = ("allgather", "gather")
"""Operations that take a block of their result."""
UFUNCS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
DTYPES = [*map(np.dtype, ("i1", "u2", "i4", "u8", "f4", "f8")), *HALVES]
_MARGIN = 3  # elements around every array, which nobody may touch


def registered() -> list[tuple[str, str]]:
    """(operation, name) of every algorithm there is now."""
    return [(operation, name) for operation in OPERATIONS for name in algorithms(operation)]


def layouts(operation: str, name: str, size: int, vendor: bool = False) -> list[tuple[int, ...]]:
    """Nodes to put this many ranks on, such that the algorithm applies; none if it never does."""
    halves = tuple(int(rank >= size // 2) for rank in range(size))
    thirds = tuple(rank * 3 // size for rank in range(size))
    uneven = tuple(int(rank == 0) for rank in range(size))
    dealt = tuple(rank % 2 for rank in range(size))
    applies = algorithms(operation)[name].applies
    options = dict.fromkeys([(0,) * size, halves, thirds, uneven, dealt])
    return [
        nodes
        for nodes in options
        if size == 1 or applies(Situation(nodes, vendor=vendor, shared=vendor and not any(nodes)))
    ]


def everywhere(*sizes: int) -> list[tuple[str, str, int]]:
    """(operation, name, ranks) of every algorithm that applies among so many threads."""
    return [(*pair, size) for pair in registered() for size in sizes if layouts(*pair, size)]


@dataclass(frozen=True)
class Case:
    """One call."""

    operation: str
    counts: tuple[int, ...]
    """Elements by rank; their sum is the buffer of operations that do not cut."""
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    op: str = "sum"
    root: int = 0
    in_place: bool = False
    accumulate: bool = False
    seed: int = 0

    @property
    def accumulates(self) -> bool:
        """Whether the result is combined with what its place holds."""
        return (
            self.accumulate
            and self.operation in ("allreduce", "reduce_scatter")
            and not self.in_place
        )

    @property
    def even(self) -> bool:
        """Whether it can be called without counts."""
        return len(set(self.counts)) == 1


def random_case(operation: str, size: int, random: Random) -> Case:
    """Any case of this operation among so many ranks."""
    largest = random.choice([0, 1, 2, 5, 40])
    counts = tuple(random.randint(0, largest) for _ in range(size))
    if random.choice([True, False]):
        counts = (counts[0],) * size
    return Case(
        operation,
        counts,
        random.choice(DTYPES),
        random.choice(list(UFUNCS)),
        random.randint(0, size - 1),
        random.choice([True, False]),
        random.choice([True, False]),
        random.randint(0, 1000),
    )


def check(axis: Axis, name: str, case: Case, module: Any = np) -> None:
    """The result against NumPy, and nothing else changed; or one error on every rank.

    Arrays are those of `module`, NumPy or CuPy.
    """
    inputs = [_input(case, rank) for rank in range(axis.size)]
    mine = inputs[axis.rank]
    if not serves(axis, name, case, module is not np):
        with pytest.raises(ValueError, match=f"algorithm='{name}' cannot do this {case.operation}"):
            call(axis, name, case, module.asarray(mine.copy()))
        return
    x, out, rooms = _arrays(axis.rank, case, mine, module)
    held = [] if out is None or not case.accumulates else [to_kind(out, "cpu").copy()]
    rows = [*held, *inputs]
    result = call(axis, name, case, x, out)
    expected = _expected(case, axis.rank, rows, inputs)
    assert (result is None) == (expected is None)
    x = to_kind(x, "cpu")
    if result is not None:
        assert out is None or result is out
        assert_same(to_kind(result, "cpu"), expected)
        if case.in_place and case.operation in CUT:
            x[_own(case, axis.rank)] = mine[_own(case, axis.rank)]
        elif case.in_place:
            x = mine
    assert_same(x, mine)
    for room in rooms:
        assert {*room[:_MARGIN].tolist(), *room[-_MARGIN:].tolist()} == {77}


def serves(axis: Axis, name: str, case: Case, device: bool = False) -> bool:
    """Whether the algorithm can do this call, by what it was registered with."""
    if axis.size == 1:
        return True
    known = algorithms(case.operation)[name]
    half = case.dtype in HALVES
    strict = case.operation in REDUCTIONS and (half or axis.deterministic)
    nodes = tuple(node.index for node in axis.transport.nodes())
    vendor = axis.transport.vendor is not None and not device
    shared = axis.shares_memory and not device
    situation = Situation(nodes, not half, strict, case.even, vendor, shared, device)
    return known.applies(situation) and (known.ordered or not strict)


def call(axis: Axis, name: str | None, case: Case, x: np.ndarray, out: Any = None) -> Any:
    """Make the call; the result, or None where there is none."""
    options: dict[str, Any] = {"out": out, "algorithm": name}
    counts = None if case.even else case.counts
    accumulate = case.accumulates and out is not None
    match case.operation:
        case "allreduce":
            return axis.allreduce(x, case.op, accumulate=accumulate, **options)
        case "reduce_scatter":
            return axis.reduce_scatter(x, case.op, counts=counts, accumulate=accumulate, **options)
        case "reduce":
            return axis.reduce(x, case.op, case.root, **options)
        case "broadcast":
            return axis.broadcast(x, case.root, **options)
        case "allgather":
            return axis.allgather(x, counts=counts, **options)
        case "gather" | "scatter":
            return getattr(axis, case.operation)(x, case.root, counts=counts, **options)
        case _:
            sends, receives = exchanged(case, axis.rank)
            uneven = {} if case.even else {"sends": sends, "receives": receives}
            return axis.alltoall(x, **uneven, **options)


def exchanged(case: Case, rank: int) -> tuple[list[int], list[int]]:
    """What a rank sends to and receives from each: rank r sends counts[(r + s) % p] to rank s."""
    size = len(case.counts)
    return (
        [case.counts[(rank + other) % size] for other in range(size)],
        [case.counts[(other + rank) % size] for other in range(size)],
    )


def sequential(rows: list[np.ndarray], op: str, stepwise: bool) -> np.ndarray:
    """The reduction in the order of the rows; 16-bit floats in float32, rounded as asked."""
    dtype = rows[0].dtype
    wide = np.dtype(np.float32) if dtype in HALVES else dtype
    total = rows[0].astype(wide)
    for row in rows[1:]:
        total = UFUNCS[op](total, row.astype(wide))
        if stepwise:
            total = total.astype(dtype).astype(wide)
    return total.astype(dtype)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes(), f"{found} is not {expected}"


def _input(case: Case, rank: int) -> np.ndarray:
    count = case.counts[rank] if case.operation in JOINED else sum(case.counts)
    if case.operation == "alltoall":
        count = sum(exchanged(case, rank)[0])
    low = 1 if case.op == "prod" else 0
    values = np.random.default_rng([case.seed, rank]).integers(low, low + 2, count)
    return values.astype(case.dtype)


def _arrays(rank: int, case: Case, mine: np.ndarray, module: Any) -> tuple[Any, Any, list[Any]]:
    """Input, output and the arrays with margins in which they lie."""
    if case.in_place and case.operation in JOINED:
        room = _room(sum(case.counts), case.dtype, module)
        out = room[_MARGIN:-_MARGIN]
        out[_own(case, rank)] = module.asarray(mine)
        return out[_own(case, rank)], out, [room]
    room = _room(mine.size, case.dtype, module)
    x = room[_MARGIN:-_MARGIN]
    x[...] = module.asarray(mine)
    if case.in_place:
        return x, x[_own(case, rank)] if case.operation in CUT else x, [room]
    if case.seed % 2:
        return x, None, [room]
    count = {True: case.counts[rank], False: sum(case.counts)}[case.operation in CUT]
    if case.operation == "alltoall":
        count = sum(exchanged(case, rank)[1])
    other = _room(count, case.dtype, module)
    other[_MARGIN:-_MARGIN] = 2
    return x, other[_MARGIN:-_MARGIN], [room, other]


def _room(count: int, dtype: np.dtype[Any], module: Any) -> Any:
    return module.full(count + 2 * _MARGIN, 77, dtype)


def _own(case: Case, rank: int) -> slice:
    start = sum(case.counts[:rank])
    return slice(start, start + case.counts[rank])


def _expected(
    case: Case, rank: int, rows: list[np.ndarray], inputs: list[np.ndarray]
) -> np.ndarray | None:
    if case.operation in ("reduce", "gather") and rank != case.root:
        return None
    match case.operation:
        case "allreduce" | "reduce":
            return sequential(rows, case.op, False)
        case "reduce_scatter":
            held, blocks = rows[: -len(inputs)], [x[_own(case, rank)] for x in inputs]
            return sequential([*held, *blocks], case.op, False)
        case "allgather" | "gather":
            return np.concatenate(inputs)
        case "broadcast":
            return inputs[case.root]
        case "scatter":
            return inputs[case.root][_own(case, rank)]
        case _:
            blocks = []
            for source, x in enumerate(inputs):
                sends = exchanged(case, source)[0]
                blocks.append(x[sum(sends[:rank]) : sum(sends[: rank + 1])])
            return np.concatenate(blocks)
