"""Meshes: which ranks an axis joins, products, placement, the map of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import hpcml
from hpcml.comm import Axis, Mesh
from hpcml.comm.alone import Alone
from hpcml.comm.mesh import placement
from hpcml.comm.transport import Node
from hpcml.errors import UserError


class Elsewhere(Alone):
    """A rank of a job on several nodes, as far as making a mesh goes: nothing is sent."""

    def __init__(self, nodes: Sequence[Node], rank: int = 0) -> None:
        self.size = len(nodes)
        self.rank = rank
        self.members = tuple(range(self.size))
        self._nodes = tuple(nodes)

    def nodes(self) -> tuple[Node, ...]:
        return self._nodes

    def subset(self, ranks: Sequence[int], name: str) -> Elsewhere:
        return Elsewhere([self._nodes[rank] for rank in ranks], list(ranks).index(self.rank))


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are not there cannot agree on the table of algorithms."""
    monkeypatch.setattr("hpcml.comm.mesh.agreed", lambda transport: {})


def test_a_mesh_of_one_rank() -> None:
    mesh = Mesh(Alone())
    assert (mesh.size, mesh.rank, mesh.world.size) == (1, 0, 1)
    assert set(mesh.sizes.values()) == {1} and set(mesh.coords.values()) == {0}
    for axis in (mesh["tp"], mesh["dp"], mesh["dp", "sp_h"], mesh["pp", "tp"]):
        assert (axis.size, axis.rank) == (1, 0)
        assert axis.allreduce(np.full(3, 2.5)).tolist() == [2.5] * 3
    assert mesh["tp"].name == "tp"
    assert mesh.describe().startswith("mesh pp(1): 1 rank on 1 node\nrank  host  local\n   0  ")


def test_unknown_axes_and_mixed_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no axis 'pt' in the mesh \(pp, dp, cp"):
        Mesh(Alone())["pt"]
    with pytest.raises(UserError, match=r"mesh.pt: there is no such axis"):
        Mesh(Alone(), pt=1)
    with pytest.raises(ValueError, match="either a mapping or sizes by name"):
        Mesh(Alone(), {"a": 1}, dp=1)
    with pytest.raises(TypeError, match="comm is to be an mpi4py communicator, not 4"):
        Mesh(4)


def test_ranks_are_counted_node_by_node() -> None:
    dealt = [Node(f"n{i % 2}", i % 2, i // 2, 3) for i in range(6)]
    assert placement(tuple(dealt)) == (0, 2, 4, 1, 3, 5)
    filled = [Node(f"n{i // 3}", i // 3, i % 3, 3) for i in range(6)]
    assert placement(tuple(filled)) == tuple(range(6))


@pytest.mark.usefixtures("no_table")
def test_the_map_shows_coordinates_and_hosts() -> None:
    nodes = [Node(f"n{i // 2}", i // 2, i % 2, 2) for i in range(4)]
    mesh = Mesh(Elsewhere(nodes, rank=2), dp=2, tp=2)
    assert mesh.coords["dp"] == 1 and mesh.coords["tp"] == 0
    assert mesh.node == Node("n1", 1, 0, 2)
    assert mesh.describe().splitlines() == [
        "mesh dp(2) * tp(2): 4 ranks on 2 nodes",
        "rank  dp  tp  host  local",
        "   0   0   0    n0      0",
        "   1   0   1    n0      1",
        "   2   1   0    n1      0",
        "   3   1   1    n1      1",
    ]


@pytest.mark.usefixtures("no_table")
def test_the_map_of_a_large_mesh_is_listed_by_host() -> None:
    nodes = [Node(f"n{i // 64}", i // 64, i % 64, 64) for i in range(128)]
    lines = Mesh(Elsewhere(nodes), pp=2, dp=16, tp=4).describe().splitlines()
    assert lines == [
        "mesh pp(2) * dp(16) * tp(4): 128 ranks on 2 nodes",
        " ranks  pp    dp   tp  host",
        "  0-63   0  0-15  0-3    n0",
        "64-127   1  0-15  0-3    n1",
    ]


@pytest.mark.mpi
def test_everything_lies_along_dp_by_default() -> None:
    mesh = Mesh()
    assert mesh.sizes["dp"] == mesh.size == mesh["dp"].size
    assert mesh["dp"].rank == mesh.rank == mesh.world.rank
    assert mesh["dp"].allgather_object(mesh.rank) == list(range(mesh.size))
    if mesh.size > 1:
        assert mesh["dp", "sp_h", "cp"] is mesh["dp"]
    assert mesh["tp"].size == 1
    assert mesh.node.local_size == mesh.size


@pytest.mark.mpi(min_size=4)
def test_axes_join_the_ranks_of_the_grid() -> None:
    mesh = Mesh(pp=2, tp=2)
    if mesh.size != 4:
        pytest.skip("laid out for 4 ranks")
    pp, tp = mesh.coords["pp"], mesh.coords["tp"]
    assert mesh.rank == 2 * pp + tp
    assert mesh["tp"].allgather_object(mesh.rank) == [2 * pp, 2 * pp + 1]
    assert mesh["pp"].allgather_object(mesh.rank) == [tp, tp + 2]
    assert mesh["tp", "pp"] is mesh["pp", "tp"]
    assert mesh["tp", "pp"].name == "pp*tp"
    assert mesh["tp", "pp"].allgather_object(mesh.rank) == [0, 1, 2, 3]
    assert mesh["dp"].size == 1


@pytest.mark.mpi(min_size=4)
def test_a_product_may_be_used_by_some_ranks_alone() -> None:
    mesh = Mesh({"stage": 2, "replica": 2, "rest": mesh_size() // 4})
    if mesh.coords["stage"] == 1:
        ranks = mesh["replica", "rest"].allgather_object(mesh.rank)
        assert ranks == list(range(mesh.size // 2, mesh.size))
    mesh.world.barrier()


def check_split(mesh: Mesh, inner: int) -> None:
    dp = mesh["dp"]
    between, within = mesh.split("dp", inner, ("replica", "shard"))
    assert (between.name, within.name) == ("dp.replica", "dp.shard")
    assert (between.size, within.size) == (dp.size // inner, inner)
    assert dp.rank == between.rank * inner + within.rank
    group = dp.rank // inner
    ranks = [group * inner + place for place in range(inner)]
    assert within.allgather_object(dp.rank) == ranks
    assert between.allgather_object(dp.rank) == list(range(within.rank, dp.size, inner))
    x = within.empty(100)
    x[...] = dp.rank
    within.allreduce(x, out=x)
    assert (x == sum(ranks)).all()
    before = mesh.ledger.snapshot()
    between.allreduce(x, out=x)
    assert (x == sum(range(dp.size))).all()
    if between.size > 1:
        counted = (mesh.ledger.snapshot() - before)["dp.replica"]
        assert counted["all_reduce"].bytes == x.nbytes
    if within.size > 1:  # communicators are few
        assert mesh.split("dp", inner, ("replica", "shard"))[1].transport is within.transport


@pytest.mark.mpi
@pytest.mark.parametrize("inner", [1, 2, 0])
def test_an_axis_is_cut_into_groups(inner: int) -> None:
    mesh = Mesh()
    check_split(mesh, 1 if mesh.size % 2 and inner == 2 else inner or mesh.size)


@pytest.mark.parametrize(("ranks", "inner"), [(1, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 4)])
def test_an_axis_of_threads_is_cut_into_groups(ranks: int, inner: int) -> None:
    hpcml.run(lambda: check_split(Mesh(), inner), ranks=ranks)


def test_a_product_is_cut_into_groups_of_neighbours() -> None:
    def program() -> None:
        mesh = Mesh(dp=2, cp=2, tp=2)
        between, within = mesh.split(("cp", "dp"), 2)
        tp = mesh.coords["tp"]
        first = 4 * mesh.coords["dp"] + tp
        assert within.name == "dp*cp.within" and between.name == "dp*cp.between"
        assert within.allgather_object(mesh.rank) == [first, first + 2]
        first = 2 * mesh.coords["cp"] + tp
        assert between.allgather_object(mesh.rank) == [first, first + 4]

    hpcml.run(program, ranks=8)


def test_groups_that_do_not_divide_an_axis_are_refused() -> None:
    def refused(inner: int) -> str:
        with pytest.raises(UserError) as caught:
            Mesh().split("dp", inner)
        return str(caught.value)

    assert set(hpcml.run(refused, 4, ranks=6)) == {
        "dp(6) cannot be cut into groups of 4 ranks: use 1, 2, 3 or 6"
    }
    assert refused(0) == "dp(1) cannot be cut into groups of 0 ranks: use 1"


def mesh_size() -> int:
    return Mesh().size


@pytest.mark.mpi(min_size=2)
def test_a_communicator_of_the_callers() -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
    mesh = Mesh(half)
    assert mesh.size == half.size
    total = mesh["dp"].allreduce(np.array([MPI.COMM_WORLD.rank]))[0]
    assert total == sum(range(MPI.COMM_WORLD.rank % 2, MPI.COMM_WORLD.size, 2))
    backwards = MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank)
    assert Mesh(backwards).rank == MPI.COMM_WORLD.size - 1 - MPI.COMM_WORLD.rank


@pytest.mark.mpi(min_size=2)
def test_a_mesh_that_does_not_multiply_is_refused_on_all_ranks() -> None:
    size = mesh_size()
    message = rf"^mesh dp\({size + 1}\) = {size + 1} ranks, but {size} were started: set mesh.dp=0"
    with pytest.raises(UserError, match=message):
        Mesh(dp=size + 1)


@pytest.mark.mpi(min_size=2)
def test_thousands_of_meshes_do_not_use_up_the_communicators() -> None:
    """MPICH has room for about 2,000; meshes over the same ranks share theirs."""
    total = 0
    for _ in range(2500):
        total = Mesh(dp=0, tp=1).size
    assert total == mesh_size()


@pytest.mark.mpi(min_size=3)
def test_a_group_counts_its_ranks_in_the_order_given() -> None:
    """What puts ranks that were dealt out in turn in order, node by node."""
    mesh = Mesh()
    order = [0, *range(mesh.size - 1, 0, -1)]
    turned = Axis("turned", mesh.world.transport.subset(order, "turned"))
    assert turned.rank == order.index(mesh.rank)
    assert turned.allgather_object(mesh.rank) == order
