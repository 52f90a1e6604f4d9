"""A mesh of ranks with named axes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from hpcml.comm import grid
from hpcml.comm.alone import Alone
from hpcml.comm.axis import Axis
from hpcml.comm.choice import agreed
from hpcml.comm.ledger import Ledger
from hpcml.comm.transport import Node, Transport
from hpcml.comm.world import world, wrap

_ROWS = 64


class Mesh:
    """Ranks laid out on named axes, outermost first, so that inner axes stay within a node.

    `Mesh(dp=2, tp=2)` uses the usual names (`pp, dp, cp, sp_d, sp_h, sp_w, tp`); those not given
    have size 1, except `dp`, which takes what is left, as it does for `dp=0`. So `Mesh()` puts all
    ranks along dp. `Mesh(layout={"stage": 2, "replica": 4})` has names and an order of one's own.

    `mesh["tp"]` is an `Axis`, `mesh["dp", "sp_h"]` the product axis, with the ranks in the order of
    the mesh. Axes of size 1 are left out of a product, so that `mesh["dp", "sp_h"]` is `mesh["dp"]`
    where space is not divided. A usual name that the mesh does not have is an axis of size 1.

    Making a mesh is collective over `comm`, which is an mpi4py communicator; by default all ranks
    of the job. The first one initialises MPI; a process started alone needs none.

    `deterministic`: reductions combine in the order of the ranks (see `Axis`).

    Raises `UserError` for sizes that cannot be, unknown names, and a product that is not the number
    of ranks.
    """

    def __init__(
        self,
        comm: Any = None,
        layout: Mapping[str, int] | None = None,
        *,
        deterministic: bool = False,
        **sizes: int,
    ) -> None:
        """Lay the ranks out; `Mesh({"stage": 2})` is short for `Mesh(layout={"stage": 2})`."""
        if isinstance(comm, Mapping) and layout is None:
            comm, layout = None, comm
        if layout is not None and sizes:
            raise ValueError(f"pass either a mapping or sizes by name, not both: {layout}, {sizes}")
        wanted = grid.usual(sizes) if layout is None else layout
        base = world() if comm is None else wrap(comm)
        self.ledger = Ledger()
        self.grid = grid.resolve(wanted, base.size)
        # A communicator of the caller's has the order that the caller wants.
        order = tuple(range(base.size)) if comm is not None else placement(base.nodes())
        self._transport = _reordered(base, order)
        self._nodes = self._transport.nodes()
        self.deterministic = deterministic
        self._table = agreed(self._transport)
        self.world = self._axis("world", self._transport)
        self._axes = self._all_axes()

    @property
    def size(self) -> int:
        """Number of ranks of the mesh."""
        return self.grid.size

    @property
    def rank(self) -> int:
        """Number of this rank in the mesh."""
        return self._transport.rank

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, outermost first."""
        return self.grid.sizes

    @property
    def coords(self) -> dict[str, int]:
        """Coordinates of this rank by axis name."""
        return self.grid.coords(self.rank)

    @property
    def node(self) -> Node:
        """The node of this rank: host name, local rank, ranks per node."""
        return self._nodes[self.rank]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The node of each rank of the mesh."""
        return self._nodes

    def __getitem__(self, names: str | tuple[str, ...]) -> Axis:
        """The axis of this name, or the product of several: local, the mesh has made them all.

        Raises `ValueError` for a name that is neither in the mesh nor a usual one.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            if name not in self.grid.names and name not in grid.AXES:
                raise ValueError(f"no axis {name!r} in the mesh ({', '.join(self.grid.names)})")
        large = tuple(name for name in self.grid.ordered(chosen) if self.sizes[name] > 1)
        return self._axes[large] if large else self._axis(chosen[0], Alone())

    def split(
        self,
        name: str | tuple[str, ...],
        inner: int,
        names: tuple[str, str] = ("between", "within"),
    ) -> tuple[Axis, Axis]:
        """Cut an axis (or a product) into groups of `inner` consecutive ranks. Collective over it.

        Returns two axes: that *between* the groups, which joins the ranks of equal place in theirs,
        and that *within* the group of this rank. An all-reduce within and then between is one over
        the whole axis; one of the two has size 1 for `inner` = 1 or the whole size. The ledger
        knows them by the axis and `names`: `split("dp", 2, ("replica", "shard"))` gives
        "dp.replica" and "dp.shard".

        Consecutive ranks share a node where inner axes do, so frequent traffic belongs within.

        Raises `UserError` if the size of the axis is no multiple of `inner`.
        """
        axis = self[name]
        groups = grid.split(axis.name, axis.size, axis.rank, inner)
        labels = [f"{axis.name}.{suffix}" for suffix in names]
        between, within = (
            self._axis(label, axis.transport.subset(ranks, label))
            for label, ranks in zip(labels, groups, strict=True)
        )
        return between, within

    def __repr__(self) -> str:
        return f"Mesh({self.grid}, rank={self.rank})"

    def describe(self) -> str:
        """The map of ranks to coordinates and hosts, as a table to print.

        Axes of size 1 are left out; a mesh of more than 64 ranks is listed by host.
        """
        hosts = 1 + max(node.index for node in self._nodes)
        ranks = f"{self.size} rank{'s' * (self.size > 1)} on {hosts} node{'s' * (hosts > 1)}"
        names = [name for name, size in self.sizes.items() if size > 1]
        rows = self._by_rank(names) if self.size <= _ROWS else self._by_node(names)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join([f"mesh {self.grid}: {ranks}", *lines])

    def _axis(self, name: str, transport: Transport) -> Axis:
        return Axis(name, transport, self.ledger, self.deterministic, self._table)

    def _by_rank(self, names: list[str]) -> list[list[str]]:
        rows = [["rank", *names, "host", "local"]]
        for rank, node in enumerate(self._nodes):
            here = self.grid.coords(rank)
            places = [str(here[name]) for name in names]
            rows.append([str(rank), *places, node.host, str(node.local_rank)])
        return rows

    def _by_node(self, names: list[str]) -> list[list[str]]:
        rows = [["ranks", *names, "host"]]
        for index in range(1 + max(node.index for node in self._nodes)):
            ranks = [rank for rank, node in enumerate(self._nodes) if node.index == index]
            coords = [self.grid.coords(rank) for rank in ranks]
            spans = [_span([here[name] for here in coords]) for name in names]
            rows.append([_span(ranks), *spans, self._nodes[ranks[0]].host])
        return rows

    def _all_axes(self) -> dict[tuple[str, ...], Axis]:
        """The axes larger than 1 and all their products.

        Making a communicator is collective. Made on demand, a product that only some ranks ask for
        first would hang the job; made here, all ranks make the same ones in the same order.
        """
        axes = {}
        large = [name for name, size in self.sizes.items() if size > 1]
        for count in range(1, len(large) + 1):
            for names in combinations(large, count):
                label = "*".join(names)
                transport = self._transport.subset(self.grid.group(self.rank, *names), label)
                axes[names] = self._axis(label, transport)
        return axes


def placement(nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """Ranks of the job in the order in which the mesh counts them: node by node.

    The identity where the launcher fills one node after the other. Where it deals ranks out in
    turn, counting by node keeps the inner axes of the mesh within a node.
    """
    return tuple(sorted(range(len(nodes)), key=lambda rank: (nodes[rank].index, rank)))


def _reordered(base: Transport, order: tuple[int, ...]) -> Transport:
    in_order = order == tuple(range(base.size))
    return base if in_order else base.subset(order, "world")


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
