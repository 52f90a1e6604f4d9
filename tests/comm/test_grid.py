"""Rank arithmetic, without processes."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml.comm.grid import AXES, Grid, resolve, usual
from hpcml.errors import UserError

shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


def grid_of(shape: tuple[int, ...]) -> Grid:
    return Grid(tuple("abcd"[: len(shape)]), shape)


@given(shapes)
def test_ranks_are_counted_as_in_a_c_ordered_array(shape: tuple[int, ...]) -> None:
    grid = grid_of(shape)
    for rank, place in enumerate(product(*map(range, shape))):
        assert tuple(grid.coords(rank).values()) == place
        assert grid.rank(grid.coords(rank)) == rank


@settings(deadline=None, max_examples=50)
@given(shapes)
def test_groups_are_slices_of_the_array_of_ranks(shape: tuple[int, ...]) -> None:
    grid = grid_of(shape)
    ranks = np.arange(grid.size).reshape(shape)
    for count in range(1, len(shape) + 1):
        for dims in combinations(range(len(shape)), count):
            names = [grid.names[dim] for dim in dims]
            for rank in range(grid.size):
                place = np.unravel_index(rank, shape)
                at = tuple(slice(None) if dim in dims else place[dim] for dim in range(len(shape)))
                expected = tuple(ranks[at].reshape(-1).tolist())
                assert grid.group(rank, *names) == expected
                assert grid.group(rank, *reversed(names)) == expected


def test_a_group_worked_by_hand() -> None:
    grid = resolve({"pp": 2, "dp": 3, "tp": 2}, 12)
    assert grid.coords(7) == {"pp": 1, "dp": 0, "tp": 1}
    assert grid.group(7, "tp") == (6, 7)
    assert grid.group(7, "dp") == (7, 9, 11)
    assert grid.group(7, "pp") == (1, 7)
    assert grid.group(7, "tp", "pp") == (0, 1, 6, 7)


def test_coordinates_left_out_are_zero_and_wrong_ones_are_refused() -> None:
    grid = resolve({"pp": 2, "dp": 3}, 6)
    assert grid.rank({"pp": 1}) == 3
    with pytest.raises(ValueError, match=r"dp=3 is outside the axis dp\(3\)"):
        grid.rank({"dp": 3})
    with pytest.raises(ValueError, match=r"no axis 'tp' in the mesh \(pp, dp\)"):
        grid.rank({"tp": 0})
    with pytest.raises(ValueError, match="rank 6 is outside a mesh of 6 ranks"):
        grid.coords(6)


def test_usual_axes_have_their_order_and_dp_fills_up() -> None:
    assert tuple(usual({"tp": 2, "pp": 2})) == AXES
    grid = resolve(usual({"tp": 2, "pp": 2}), 12)
    assert grid.sizes == dict(pp=2, dp=3, cp=1, sp_d=1, sp_h=1, sp_w=1, tp=2)
    assert resolve(usual({}), 5).sizes["dp"] == 5
    assert str(grid) == "pp(2) * dp(3) * tp(2)"


def test_names_of_ones_own_keep_their_order() -> None:
    grid = resolve({"replica": 3, "stage": 2}, 6)
    assert grid.coords(1) == {"replica": 0, "stage": 1}


@pytest.mark.parametrize(
    ("sizes", "ranks", "message"),
    [
        (
            dict(pp=2, dp=2, tp=2),
            6,
            "mesh pp(2) * dp(2) * tp(2) = 8 ranks, but 6 were started: start 8",
        ),
        (
            dict(pp=1, dp=2, tp=2),
            6,
            "mesh dp(2) * tp(2) = 4 ranks, but 6 were started: set mesh.dp=0 or start 4",
        ),
        (dict(dp=2), 1, "mesh dp(2) = 2 ranks, but 1 was started: set mesh.dp=0 or start 2"),
        (dict(dp=1, tp=1), 3, "mesh dp(1) = 1 ranks, but 3 were started: set mesh.dp=0 or start 1"),
        (
            dict(dp=0, tp=4),
            6,
            (
                "mesh tp(4) = 4 ranks, but 6 were started, which is no multiple of 4: "
                "change mesh.tp or start 8"
            ),
        ),
        (dict(stage=4), 6, "mesh stage(4) = 4 ranks, but 6 were started: start 4"),
        (dict(tp=-2), 2, "mesh.tp=-2 is not a number of ranks: use 1 or more"),
        (dict(tp=0), 2, "mesh.tp=0 is not a number of ranks: use 1 or more"),
        (dict(dp=-1), 2, "mesh.dp=-1 is not a number of ranks: use 0 (what is left) or more"),
        (dict(dp=1.5), 2, "mesh.dp=1.5 is not a whole number of ranks: use an integer"),
        (dict(dp="2"), 2, "mesh.dp='2' is not a whole number of ranks: use an integer"),
        (dict(dp=True), 1, "mesh.dp=True is not a whole number of ranks: use an integer"),
        ({3: 1}, 1, "mesh: 3 is no name of an axis; use a string such as 'dp'"),
        ({}, 1, "mesh: no axes were given; name at least one, such as {'dp': 0}"),
    ],
)
def test_impossible_meshes_are_one_line(sizes: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(sizes, ranks)
    assert str(caught.value) == message


def test_unknown_names_are_refused_by_keyword() -> None:
    with pytest.raises(UserError, match=r"^mesh.pt: there is no such axis; the axes are pp, dp"):
        usual({"pt": 2})


@given(shapes, st.integers(1, 64))
def test_a_mesh_is_laid_out_exactly_if_it_multiplies(shape: tuple[int, ...], ranks: int) -> None:
    sizes = grid_of(shape).sizes
    if prod(shape) == ranks:
        assert resolve(sizes, ranks).shape == shape
    else:
        with pytest.raises(UserError):
            resolve(sizes, ranks)
