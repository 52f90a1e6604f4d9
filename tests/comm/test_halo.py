"""Halo exchange against indexing the global array: the plan alone, ranks as threads, and MPI."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml import memory
from hpcml.backend import to_kind
from hpcml.comm import Cut, Halo, Mesh, run
from hpcml.comm.faults import Delay, Reorder, Synchronous
from hpcml.comm.halo_plan import Line, Plan, even
from hpcml.comm.sanitizer import MismatchError
from hpcml.comm.world import world

NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Case:
    """An array cut in some dims, and the mesh: axis NAMES[order[d]] for the d-th of the dims."""

    lines: tuple[Line, ...]
    order: tuple[int, ...]
    lead: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    whole: bool = False
    """Give the size of the whole instead of the blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *(sum(line.blocks) for line in self.lines), *self.tail)

    @property
    def ranks(self) -> int:
        return prod(len(line.blocks) for line in self.lines)

    def mesh(self, comm: Any = None) -> Mesh:
        axes = sorted(zip(self.order, self.lines, strict=True))
        return Mesh(comm, layout={NAMES[place]: len(line.blocks) for place, line in axes})

    def halo(self, mesh: Mesh, from_the_back: bool = False) -> Halo:
        first = -len(self.lines) - len(self.tail) if from_the_back else len(self.lead)
        return Halo(
            mesh,
            {
                first + dim: Cut(
                    NAMES[place],
                    sum(line.blocks) if self.whole else line.blocks,
                    line.widths,
                    line.periodic,
                )
                for dim, (place, line) in enumerate(zip(self.order, self.lines, strict=True))
            },
        )

    def places(self, mesh: Mesh) -> tuple[int, ...]:
        """Where this rank stands along each of the lines."""
        return tuple(mesh.coords[NAMES[place]] for place in self.order)

    def cells(
        self, places: tuple[int, ...], ghosts: bool
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Which cells of a rank's block the global array has, and their indices there."""
        found = [np.arange(n) for n in self.lead]
        for line, place in zip(self.lines, places, strict=True):
            extent = sum(line.blocks)
            before, after = line.widths[place] if ghosts else (0, 0)
            start = sum(line.blocks[:place])
            cells = np.arange(start - before, start + line.blocks[place] + after)
            if line.periodic and extent:
                cells %= extent
            found.append(np.where((cells >= 0) & (cells < extent), cells, -1))
        index = np.broadcast_arrays(*np.ix_(*found, *(np.arange(n) for n in self.tail)))
        there = np.all([part >= 0 for part in index], axis=0)
        return there, tuple(part[there] for part in index)

    def block(self, array: np.ndarray, places: tuple[int, ...], ghosts: bool = False) -> np.ndarray:
        """What the rank there holds of the global array."""
        there, cells = self.cells(places, ghosts)
        found = np.zeros(there.shape, array.dtype)
        found[there] = array[cells]
        return found

    def add(self, array: np.ndarray, places: tuple[int, ...], values: np.ndarray) -> None:
        """The adjoint of `block` with ghosts, added to the global array."""
        there, cells = self.cells(places, ghosts=True)
        np.add.at(array, cells, values[there])

    def everywhere(self) -> list[tuple[int, ...]]:
        return list(product(*(range(len(line.blocks)) for line in self.lines)))

    @staticmethod
    def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)

    def gradients(self) -> tuple[dict[tuple[int, ...], np.ndarray], np.ndarray]:
        """A gradient of each rank's result, and what they sum to on the global array."""
        total = np.zeros(self.shape)
        found = {}
        for number, places in enumerate(self.everywhere()):
            shape = self.block(total, places, ghosts=True).shape
            found[places] = self.values(shape, number + 1)
            self.add(total, places, found[places])
        return found, total


def grids(ranks: int) -> list[tuple[int, ...]]:
    """All ways to lay so many ranks out in 1, 2 or 3 dims."""
    sides = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [
        grid for dims in (1, 2, 3) for grid in product(sides, repeat=dims) if prod(grid) == ranks
    ]


@st.composite
def cases(draw: Any, ranks: int, widest: int = 4) -> Case:
    grid = draw(st.sampled_from(grids(ranks)))
    whole = draw(st.booleans())
    lines = []
    for side in grid:
        width = st.tuples(st.integers(0, widest), st.integers(0, widest))
        if draw(st.booleans()):
            widths = (draw(width),) * side
        else:
            widths = tuple(draw(width) for _ in range(side))
        blocks = tuple(draw(st.integers(0, 4)) for _ in range(side))
        blocks = even(sum(blocks), side) if whole else blocks
        lines.append(Line(blocks, widths, draw(st.booleans())))
    order = draw(st.sampled_from(list(permutations(range(len(grid))))))
    sizes = st.lists(st.integers(1, 2), max_size=1).map(tuple)
    return Case(tuple(lines), order, draw(sizes), draw(sizes), whole)


def check(case: Case, comm: Any = None, module: Any = np) -> None:
    """On each rank: values, the adjoint, several exchanges under way, and what was counted.

    Arrays are those of `module`, NumPy or CuPy.
    """
    mesh = case.mesh(comm)
    halo, places = case.halo(mesh), case.places(mesh)
    array, other = case.values(case.shape), case.values(case.shape, 99)
    x = module.asarray(case.block(array, places))
    expected = case.block(array, places, ghosts=True)
    before = mesh.ledger.snapshot()
    result = halo.exchange(x)
    assert_same(result, expected)
    assert result.flags.c_contiguous and not module.may_share_memory(result, x)
    assert halo.padded(x.shape) == result.shape
    assert_same(result[halo.inside(x.ndim)], case.block(array, places))
    assert_counted(case, mesh, halo, before, places)

    gradients, total = case.gradients()
    first = halo.start(module.asarray(case.block(other, places)))
    back = halo.start_adjoint(module.asarray(gradients[places]))
    out = module.full(expected.shape, np.nan)
    again = case.halo(mesh, from_the_back=True).exchange(x, out=out)
    assert again is out
    assert_same(out, expected)
    assert_same(back.wait(), case.block(total, places))
    assert_same(first.wait(), case.block(other, places, ghosts=True))
    assert back.wait() is back.wait() and first.test()


def assert_counted(
    case: Case, mesh: Mesh, halo: Halo, before: Any, places: tuple[int, ...]
) -> None:
    """Ghosts received from others and cells sent to them, from the definition."""
    counts = mesh.ledger.snapshot() - before
    if halo.axis.size == 1:
        assert not counts
        return
    (operation,) = counts.pop(halo.axis.name).items()
    assert not counts and operation[0] == "halo" and operation[1].calls == 1
    owners = np.zeros(case.shape)
    for number, there in enumerate(case.everywhere()):
        owners[case.cells(there, ghosts=False)[1]] = number + 1
    me = case.everywhere().index(places) + 1
    of = {there: case.block(owners, there, ghosts=True) for there in case.everywhere()}
    received = np.count_nonzero((of[places] != me) & (of[places] != 0))
    sent = sum(np.count_nonzero(of[there] == me) for there in of if there != places)
    assert (operation[1].bytes, operation[1].bytes_sent) == (8 * received, 8 * sent)


def assert_same(found: Any, expected: np.ndarray) -> None:
    found = to_kind(found, "cpu")
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.array_equal(found, expected)


# --- the plan alone -----------------------------------------------------------------------------


@given(st.sampled_from([1, 2, 6, 12, 24]).flatmap(lambda ranks: cases(ranks, widest=9)))
@settings(max_examples=150)
def test_plans_of_all_ranks_fit_together(case: Case) -> None:
    """Carry the plans of all ranks out by hand, without processes."""
    numbers = np.arange(case.ranks).reshape([len(line.blocks) for line in case.lines])
    plans = [Plan(case.lines, numbers, rank) for rank in range(case.ranks)]
    case = Case(case.lines, case.order)
    array = case.values(case.shape)
    blocks = [case.block(array, places) for places in case.everywhere()]
    for rank, (plan, places) in enumerate(zip(plans, case.everywhere(), strict=True)):
        assert blocks[rank].shape == plan.block
        result = np.full(plan.padded, np.nan)
        result[plan.inside] = blocks[rank]
        for gap in plan.gaps:
            result[gap] = 0
        for source, target in plan.wraps:
            result[target] = blocks[rank][source]
        assert rank not in plan.receives and rank not in plan.sends
        for peer, targets in plan.receives.items():
            for source, target in zip(plans[peer].sends[rank], targets, strict=True):
                result[target] = blocks[peer][source]
        assert set(plan.sends) == {p for p in range(case.ranks) if rank in plans[p].receives}
        assert_same(result, case.block(array, places, ghosts=True))


def test_blocks_are_as_even_as_possible() -> None:
    assert even(10, 4) == (3, 3, 2, 2)
    assert even(2, 3) == (1, 1, 0)
    assert even(0, 2) == (0, 0)


def test_one_message_from_each_neighbour_corners_too() -> None:
    line = Line((4, 4, 4), ((1, 1),) * 3)
    plan = Plan((line, line), np.arange(9).reshape(3, 3), 4)
    assert sorted(plan.receives) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(len(boxes) == 1 for boxes in plan.receives.values())


def test_ghosts_wider_than_a_block_come_from_several_ranks() -> None:
    plan = Plan((Line((2, 2, 2, 2), ((3, 0),) * 4),), np.arange(4), 3)
    assert plan.receives == {1: [(slice(0, 1),)], 2: [(slice(1, 3),)]}


# --- ranks as threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_threads(ranks: int) -> None:
    @given(cases(ranks))
    @settings(max_examples=40)
    def property(case: Case) -> None:
        run(check, case, ranks=ranks)

    property()


FAULTS = {"synchronous": Synchronous(), "delay": Delay(0.002), "reorder": Reorder()}


@pytest.mark.parametrize("fault", FAULTS)
def test_threads_when_messages_go_otherwise(fault: str) -> None:
    @given(st.sampled_from([2, 4, 6]).flatmap(cases))
    @settings(max_examples=8)
    def property(case: Case) -> None:
        run(check, case, ranks=case.ranks, faults=[FAULTS[fault]])

    property()


def test_an_axis_may_be_a_product_in_any_order_of_dims() -> None:
    def program() -> None:
        mesh = Mesh(layout={"a": 2, "b": 2, "c": 2})
        array = np.arange(48.0).reshape(4, 12)
        cuts = {1: Cut(("c", "a"), 12, width=1), 0: Cut("b", 4, width=(1, 0), periodic=True)}
        halo = Halo(mesh, cuts)
        b, ca = mesh.coords["b"], 2 * mesh.coords["a"] + mesh.coords["c"]
        rows, columns = slice(2 * b, 2 * b + 2), slice(3 * ca, 3 * ca + 3)
        around = np.pad(np.concatenate([array[-1:], array]), ((0, 0), (1, 1)))
        expected = around[2 * b : 2 * b + 3, 3 * ca : 3 * ca + 5]
        assert_same(halo.exchange(array[rows, columns]), expected)

    run(program, ranks=8)


def test_16_bit_ghost_gradients_are_added_in_float32() -> None:
    def program(dtype: Any) -> None:
        mesh = Mesh(layout={"a": 3})
        halo = Halo(mesh, {0: Cut("a", (0, 1, 0), width=1)})
        g = np.full(3 if mesh.rank == 1 else 2, 2**-8, dtype)
        g[1] = 1 if mesh.rank == 1 else g[1]
        expected = [1 + 2**-7] if mesh.rank == 1 else []  # at 16 bits, 1 + 2^-8 + 2^-8 is 1
        assert halo.adjoint(g).tolist() == expected

    run(program, ml_dtypes.bfloat16, ranks=3)


def test_buffers_are_used_again_and_are_not_needed_for_whole_rows() -> None:
    def program() -> None:
        mesh = Mesh(layout={"a": 2})
        for dim, buffers in ((0, 0), (1, 2)):
            x = np.ones((4, 4))
            halo = Halo(mesh, {dim: Cut("a", 8)})
            for _ in range(3):
                halo.exchange(x)
                assert memory.account().live["buffers"] == buffers * 4 * x.itemsize

    run(program, ranks=2)


def test_a_mesh_without_the_axis_is_one_block() -> None:
    mesh = Mesh(layout={"a": 1})
    halo = Halo(mesh, {-1: Cut("sp_w", 3, width=1, periodic=True), -2: Cut("a", 1, width=(0, 1))})
    assert halo.exchange(np.array([[1, 2, 3]])).tolist() == [[3, 1, 2, 3, 1], [0] * 5]
    assert not mesh.ledger.snapshot()


WRONG = {
    "size=-1 along a: give the size": {0: Cut("a", -1)},
    "blocks of 0 or more cells for 1 rank": {0: Cut("a", (1, 2))},
    "width=-1 along a: give 0 or more": {0: Cut("a", 4, width=-1)},
    "such a pair for each of 1 rank": {0: Cut("a", 4, width=((1, 1), (1, 1)))},
    "no axis 'z' in the mesh": {0: Cut("z", 4)},
    "distinct axes, not \\['a', 'a'\\]": {0: Cut("a", 4), 1: Cut("a", 4)},
    "distinct axes, not \\[\\]": {},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_the_mesh_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Halo(Mesh(layout={"a": 1}), WRONG[message])


def test_arrays_that_do_not_fit_are_refused() -> None:
    halo = Halo(Mesh(layout={"a": 1, "b": 1}), {0: Cut("a", 4), -1: Cut("b", 5)})
    for shape in ((4, 4), (3, 5), (4,), ()):
        with pytest.raises(ValueError, match="the block of this rank has 4 in dim 0, 5 in dim -1"):
            halo.exchange(np.zeros(shape))
    with pytest.raises(ValueError, match="the block with its ghosts has 6 in dim 0, 7 in dim -1"):
        halo.adjoint(np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"out has shape \(4, 5\)"):
        halo.exchange(np.zeros((4, 5)), out=np.zeros((4, 5)))
    with pytest.raises(ValueError, match="dtype complex128 cannot be communicated"):
        halo.exchange(np.zeros((4, 5), complex))


def test_a_rank_that_does_not_come_is_named() -> None:
    def program() -> None:
        mesh = Mesh(layout={"a": 3})
        if mesh.rank != 1:
            Halo(mesh, {0: Cut("a", 6)}).exchange(np.zeros(2))

    with pytest.raises(TimeoutError, match=r"Missing in halo #1: rank 1"):
        run(program, ranks=3, timeout=0.5)


@pytest.mark.parametrize(
    ("debug", "message"),
    [
        ("", r"a message of (24|32) bytes came from rank"),
        ("comm", r"(?s)do not call the same.*halo #1, 3 float64, .*halo #1, 4 float64"),
    ],
)
def test_blocks_of_other_sizes_are_found(
    monkeypatch: pytest.MonkeyPatch, debug: str, message: str
) -> None:
    def program() -> None:
        mesh = Mesh(layout={"a": 2})
        Halo(mesh, {0: Cut("a", 4)}).exchange(np.zeros((2, 3 + mesh.rank)))

    monkeypatch.setenv("HPCML_DEBUG", debug)
    with pytest.raises((ValueError, MismatchError), match=message):
        run(program, ranks=2)


# --- MPI ----------------------------------------------------------------------------------------


class SynchronousSends:
    """A transport whose sends wait for the receiver."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def isend(self, buffer: Any, dest: int, tag: int, synchronous: bool = False) -> Any:
        return self.base.isend(buffer, dest, tag, synchronous=True)

    def subset(self, ranks: Any, name: str) -> Any:
        return SynchronousSends(self.base.subset(ranks, name))


@pytest.mark.mpi
@pytest.mark.parametrize("synchronous", [False, True])
def test_mpi(synchronous: bool) -> None:
    base = world()

    @given(cases(base.size))
    @settings(max_examples=25)
    def property(case: Case) -> None:
        check(case, SynchronousSends(base) if synchronous else None)

    property()
