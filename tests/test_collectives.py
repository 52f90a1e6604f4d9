"""Every row of the adjoint table: values, the adjoint identity, and the layers that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml import Tensor, collectives, no_grad
from hpcml.comm import Axis, Cut, Halo, Mesh
from hpcml.comm.halo_plan import even as even_blocks
from hpcml.nn import functional as F
from tests.ranks import OnRanks, on_ranks_of

on_ranks = on_ranks_of(Mesh, [1, 2, 3, 4, 5, 8])


def numbers(shape: tuple[int, ...], seed: int, dtype: Any = np.float64) -> np.ndarray:
    """Small whole numbers: sums of them are exact in any order."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(dtype)


def uneven(axis: Axis) -> list[int]:
    """Blocks of 1, 2, 0, 1, 2, ... cells."""
    return [(rank + 1) % 3 for rank in range(axis.size)]


def parts(x: np.ndarray, axis: Axis, dim: int, counts: list[int] | None) -> list[np.ndarray]:
    """The blocks of all ranks."""
    counts = counts or [x.shape[dim] // axis.size] * axis.size
    return np.split(x, np.cumsum(counts)[:-1], axis=dim)


@dataclass(frozen=True)
class Row:
    """An operation from one state to another, and what it is by definition on all ranks at once."""

    source: str
    to: str
    call: Callable[[Any, Axis], Tensor]
    shape: Callable[[Axis], tuple[int, ...]]
    """Of what this rank puts in."""
    result: Callable[[list[np.ndarray], Axis], list[np.ndarray]]
    """The results of all ranks from what all put in."""


def total(xs: list[np.ndarray], axis: Axis) -> list[np.ndarray]:
    return [np.sum([x.astype(float) for x in xs], axis=0).astype(xs[0].dtype)] * axis.size


def counts_of(axis: Axis, even: bool) -> list[int] | None:
    return None if even else uneven(axis)


def sized(sizes: dict[int, int]) -> tuple[int, ...]:
    """(3, 2, 4) with other sizes of these dims."""
    found = [3, 2, 4]
    for dim, size in sizes.items():
        found[dim] = size
    return tuple(found)


def gathering(to: str, dim: int, even: bool) -> Row:
    return Row(
        "S",
        to,
        lambda x, axis: collectives.all_gather(x, axis, dim, to=to, counts=counts_of(axis, even)),
        lambda axis: sized({dim: 2 if even else uneven(axis)[axis.rank]}),
        lambda xs, axis: [np.concatenate(xs, dim)] * axis.size,
    )


def cutting(source: str, dim: int, even: bool) -> Row:
    def call(x: Any, axis: Axis) -> Tensor:
        counts = counts_of(axis, even)
        if source == "P":
            return collectives.reduce_scatter(x, axis, dim, counts=counts)
        return collectives.scatter(x, axis, dim, source=source, counts=counts)

    def result(xs: list[np.ndarray], axis: Axis) -> list[np.ndarray]:
        whole = total(xs, axis)[0] if source == "P" else xs[0]
        return parts(whole, axis, dim, counts_of(axis, even))

    def shape(axis: Axis) -> tuple[int, ...]:
        return sized({dim: 2 * axis.size if even else sum(uneven(axis))})

    return Row(source, "S", call, shape, result)


def exchanging(split: int, concat: int, even: bool) -> Row:
    def call(x: Any, axis: Axis) -> Tensor:
        cells, rows = counts_of(axis, even), counts_of(axis, even)
        return collectives.all_to_all(
            x, axis, split, concat, split_counts=cells, concat_counts=rows and rows[::-1]
        )

    def shape(axis: Axis) -> tuple[int, ...]:
        cells, rows = 2 * axis.size if even else sum(uneven(axis)), uneven(axis)[::-1][axis.rank]
        return sized({split: cells, concat: 3 if even else rows})

    def result(xs: list[np.ndarray], axis: Axis) -> list[np.ndarray]:
        return parts(np.concatenate(xs, concat), axis, split, counts_of(axis, even))

    return Row("S", "S", call, shape, result)


DIMS = (0, 1, -1)
EVEN = {"even": True, "uneven": False}
ROWS = {
    "copy": Row("I", "R", collectives.copy, lambda axis: (3, 2), lambda xs, axis: xs),
    **{
        f"all_reduce to {to}": Row(
            "P", to, lambda x, axis, to=to: collectives.all_reduce(x, axis, to=to),
            lambda axis: (3, 2), total,
        )
        for to in "IR"
    },
    **{f"all_gather to {to}, {d}, {e}": gathering(to, d, EVEN[e])
       for to in "IR" for d in DIMS for e in EVEN},
    **{f"scatter from {source}, {d}, {e}": cutting(source, d, EVEN[e])
       for source in "IR" for d in DIMS for e in EVEN},
    **{f"reduce_scatter, {d}, {e}": cutting("P", d, EVEN[e]) for d in DIMS for e in EVEN},
    **{f"all_to_all {i} {j}, {e}": exchanging(i, j, EVEN[e])
       for i, j in ((0, 1), (1, 0), (2, 0), (-1, -2)) for e in EVEN},
}  # fmt: skip
rows = pytest.mark.parametrize("name", ROWS)


def vectors(state: str, shape: tuple[int, ...], axis: Axis, seed: int, dtype: Any) -> list[Any]:
    """What each rank holds in this state; of sharded ones every rank knows its own shape only."""
    differ = state in "PS"
    shapes = axis.allgather_object(shape)
    return [numbers(shapes[r], seed + (r if differ else 0), dtype) for r in range(axis.size)]


@rows
def test_values(on_ranks: OnRanks, name: str) -> None:
    def program(mesh: Mesh) -> None:
        axis, row = mesh["dp"], ROWS[name]
        for dtype in (np.float64, np.float32, ml_dtypes.bfloat16):
            xs = vectors(row.source, row.shape(axis), axis, 5, dtype)
            mine = xs[axis.rank].copy()
            expected = row.result(xs, axis)[axis.rank]
            for x in (Tensor(mine), Tensor(np.asfortranarray(mine))):
                found = row.call(x, axis)
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found.numpy(), expected)
                np.testing.assert_array_equal(x.numpy(), xs[axis.rank])

    on_ranks(program)


COTANGENT = {"I": "I", "R": "P", "P": "R", "S": "S"}


def inner(x: np.ndarray, y: np.ndarray, state: str, axis: Axis) -> float:
    """Counted once where all ranks hold the one vector, else summed over the ranks."""
    mine = np.array([np.vdot(x, y)])
    return float(mine[0] if state == "I" else axis.allreduce(mine)[0])


@rows
def test_adjoint(on_ranks: OnRanks, name: str) -> None:
    """<F x, y> = <x, F* y>, and each result is in the state that it should be in."""

    def program(mesh: Mesh) -> None:
        axis, row = mesh["dp"], ROWS[name]
        x = Tensor(vectors(row.source, row.shape(axis), axis, 5, np.float64)[axis.rank], True)
        out = row.call(x * 1, axis)
        y = vectors(COTANGENT[row.to], out.shape, axis, 50, np.float64)[axis.rank]
        out.backward(y)
        assert x.gradient is not None
        left = inner(out.numpy(), y, row.to, axis)
        assert left == inner(x.numpy(), x.gradient, row.source, axis)
        for values, state in ((out.numpy(), row.to), (x.gradient, COTANGENT[row.source])):
            if state in "IR":
                assert len(set(axis.allgather_object(values.tobytes()))) == 1

    on_ranks(program)


def test_a_mlp_cut_by_columns_then_rows_is_the_serial_one(on_ranks: OnRanks) -> None:
    """Megatron-LM's layer: f, column-parallel, row-parallel, g; and with the sequence cut too."""

    def program(mesh: Mesh) -> None:
        axis = mesh["dp"]
        random = np.random.default_rng(0)
        shapes = ((2 * axis.size, 3), (3, 4 * axis.size), (4 * axis.size, 3))
        whole = [Tensor(random.standard_normal(shape), True) for shape in shapes]
        y = random.standard_normal((2 * axis.size, 3))
        serial = (whole[0] @ whole[1]).tanh() @ whole[2]
        serial.backward(y)
        rows = slice(2 * axis.rank, 2 * axis.rank + 2)
        hidden = slice(4 * axis.rank, 4 * axis.rank + 4)

        def weights() -> tuple[Tensor, Tensor]:
            return (
                Tensor(whole[1].numpy()[:, hidden].copy(), True),
                Tensor(whole[2].numpy()[hidden].copy(), True),
            )

        def same(found: Any, expected: Any) -> None:
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

        x, (w1, w2) = Tensor(whole[0].numpy(), True), weights()
        out = collectives.all_reduce((collectives.copy(x, axis) @ w1).tanh() @ w2, axis, to="I")
        out.backward(y)
        same(out.numpy(), serial.numpy())
        same(x.gradient, whole[0].gradient)
        same(w1.gradient, whole[1].gradient[:, hidden])
        same(w2.gradient, whole[2].gradient[hidden])

        x, (w1, w2) = Tensor(whole[0].numpy()[rows], True), weights()
        gathered = collectives.all_gather(x, axis, to="R")
        out = collectives.reduce_scatter((gathered @ w1).tanh() @ w2, axis)
        out.backward(y[rows])
        same(out.numpy(), serial.numpy()[rows])
        same(x.gradient, whole[0].gradient[rows])
        same(w1.gradient, whole[1].gradient[:, hidden])

    on_ranks(program)


GRIDS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2), 5: (5, 1), 8: (2, 4)}


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_in_blocks_is_the_serial_one(on_ranks: OnRanks, dims: int) -> None:
    """Dryden et al. 2019; kernels wider than some of the blocks, uneven blocks."""

    def program(mesh: Mesh) -> None:
        size = mesh.size
        grid = (size,) if dims == 1 else GRIDS[size]
        sizes, kernel = ((2 * size + 1,), (7,)) if dims == 1 else ((5, 7), (3, 5))
        mesh = Mesh(layout={f"sp{d}": n for d, n in enumerate(grid)})
        random = np.random.default_rng(1)
        image = random.standard_normal((2, 3, *sizes))
        weights = random.standard_normal((2, 3, *kernel))
        y = random.standard_normal((2, 2, *sizes))
        convolution = {1: F.conv1d, 2: F.conv2d}[dims]

        x, w = Tensor(image, True), Tensor(weights, True)
        serial = convolution(x, w, padding=tuple(k // 2 for k in kernel))
        serial.backward(y)

        cuts = {2 + d: Cut(f"sp{d}", n, width=kernel[d] // 2) for d, n in enumerate(sizes)}
        halo = Halo(mesh, cuts)
        starts = {d: np.cumsum((0, *even_blocks(n, grid[d]))) for d, n in enumerate(sizes)}
        places = [mesh.coords[f"sp{d}"] for d in starts]
        mine = [slice(*starts[d][place : place + 2]) for d, place in enumerate(places)]
        here = (slice(None), slice(None), *mine)
        block, w_here = Tensor(image[here].copy(), True), Tensor(weights, True)
        out = convolution(
            collectives.halo_exchange(block, halo), collectives.copy(w_here, halo.axis)
        )
        out.backward(y[here])
        for found, expected in (
            (out.numpy(), serial.numpy()[here]),
            (block.gradient, x.gradient[here]),
            (w_here.gradient, w.gradient),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    on_ranks(program)


def test_halo_exchange_adjoint(on_ranks: OnRanks) -> None:
    """<F x, y> = <x, F* y> with ghosts wider than blocks, periodic in one dim."""

    def program(mesh: Mesh) -> None:
        axis = mesh["dp"]
        cuts = {1: Cut("dp", tuple(uneven(axis)), width=(3, 2)), 0: Cut("tp", 2, periodic=True)}
        halo = Halo(mesh, cuts)
        x = Tensor(numbers((2, uneven(axis)[axis.rank]), axis.rank), True)
        out = collectives.halo_exchange(x * 1, halo)
        y = numbers(out.shape, 50 + axis.rank)
        out.backward(y)
        assert x.gradient is not None
        assert inner(out.numpy(), y, "S", axis) == inner(x.numpy(), x.gradient, "S", axis)

    on_ranks(program)


def test_backward_communicates_only_where_a_gradient_is_needed(on_ranks: OnRanks) -> None:
    def program(mesh: Mesh) -> None:
        axis, w = mesh["dp"], Tensor(np.ones(2), True)
        halo = Halo(mesh, {0: Cut("dp", 2 * axis.size)})

        def spent(x: Tensor) -> list[str]:
            before = mesh.ledger.snapshot()
            moved = (
                collectives.copy(x, axis),
                collectives.scatter(collectives.all_gather(x, axis, to="I"), axis, source="I"),
            )
            (moved[0] * w + moved[1] * w + collectives.halo_exchange(x, halo)[1:3] * w).backward(
                np.ones(2)
            )
            counts = (mesh.ledger.snapshot() - before).get("dp", {})
            return sorted(f"{name} {count.calls}" for name, count in counts.items())

        x = Tensor(np.ones(2))
        forward = ["all_gather 1", "halo 1"] if axis.size > 1 else []
        both = ["all_gather 2", "all_reduce 1", "halo 2"] if axis.size > 1 else []
        assert spent(x) == forward
        assert spent(x.requires_grad_()) == both
        with no_grad():
            assert collectives.copy(x * 1, axis).is_leaf
            assert collectives.halo_exchange(x * 1, halo).is_leaf

    on_ranks(program)
