"""Collective algorithms by operation and name, each with the cost that its paper gives it.

An algorithm is a function that every rank of a group calls with flat contiguous arrays:

    allreduce(link, x, out, reduction)            x and out of n elements, or the same array
    reduce_scatter(link, x, out, counts, reduction)   x of sum(counts), out of counts[rank]
    allgather(link, x, out, counts)               x of counts[rank], out of sum(counts)
    broadcast(link, x, root)                      in place
    reduce(link, x, out, reduction, root)         out is None but on the root
    gather(link, x, out, counts, root)            out is None but on the root
    scatter(link, x, out, counts, root)           x is None but on the root
    alltoall(link, x, out, sends, receives)       counts by rank, of this rank

`x` is only read, unless it is `out`. A rank's block of an all-gather or gather may already lie at
its place in `out`, the block of a reduce-scatter may be this rank's place in `x`. Nothing else
overlaps. The link has at least two ranks; any count may be 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPERATIONS = (
    "allreduce",
    "reduce_scatter",
    "allgather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "alltoall",
)


@dataclass(frozen=True)
class Machine:
    """The constants of the linear cost model of messages (Thakur, Rabenseifner, Gropp 2005)."""

    alpha: float
    """Seconds to start a message."""
    beta: float
    """Seconds for each byte of a message."""
    gamma: float
    """Seconds to combine two bytes' worth of numbers, for each byte."""
    per_node: int = 1
    """Ranks of the smallest node, where they are on several: these share a way to the network."""


@dataclass(frozen=True)
class Situation:
    """What decides whether an algorithm can serve a call, and which one does."""

    nodes: tuple[int, ...]
    """The node of each rank of the group."""
    native: bool = True
    """The type is one that the vendor's library reduces well: no 16-bit float."""
    ordered: bool = False
    """Contributions must be combined in the order of the ranks."""
    even: bool = True
    """All counts are equal, and all ranks know that."""
    vendor: bool = False
    """The carrier has collectives of its own, and they take so many elements."""
    shared: bool = False
    """All ranks share memory (`Link.scratch`)."""
    onto: bool = False
    """A reduction adds to what its result holds."""
    device: bool = False
    """The arrays are of GPUs: reductions are kernels, and only messages go between ranks."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    @property
    def spread(self) -> bool:
        """Whether the ranks are on several nodes."""
        return len(set(self.nodes)) > 1

    @property
    def place(self) -> str:
        """The first key of the table: "node" if all ranks share one, else "network"."""
        return "network" if self.spread else "node"

    @property
    def per_node(self) -> int:
        """Ranks of the smallest node."""
        return min(Counter(self.nodes).values())

    def __str__(self) -> str:
        facts = [f"{self.size} ranks on {len(set(self.nodes))} nodes"]
        facts += ["arrays of a GPU"] if self.device else []
        facts += [] if self.native else ["a 16-bit float"]
        facts += ["in the order of the ranks"] if self.ordered else []
        facts += [] if self.even else ["uneven counts"]
        facts += [] if self.vendor else ["no collectives of the carrier's"]
        facts += [] if self.shared else ["no shared memory"]
        return ", ".join(facts)


Cost = Callable[[int, int, Machine], float]
"""Seconds for (payload in bytes as the ledger counts it, ranks, machine)."""


def _always(situation: Situation) -> bool:
    return True


@dataclass(frozen=True)
class Algorithm:
    """One way to do one collective operation."""

    operation: str
    name: str
    run: Callable[..., None]
    cost: Cost
    ordered: bool = False
    """Combines in the order of the ranks and rounds 16-bit floats as the `Reduction` says."""
    applies: Callable[[Situation], bool] = _always
    short: bool = False
    """Takes scratch memory that grows with the buffer: not chosen for long ones."""
    adds: bool = False
    """Takes a `Reduction` that adds to what the result holds; those that are `ordered` all do."""
    prepare: Callable[[Any, Any], None] | None = None
    """`prepare(link, dtype)` does what may take long, before the first such call is on the board:
    ranks wait for each other in it."""

    def lean(self, onto: bool) -> bool:
        """Whether a call, with a result that is added to if `onto`, takes little scratch memory."""
        return not self.short and (not onto or self.adds or self.ordered)


_algorithms: dict[str, dict[str, Algorithm]] = {operation: {} for operation in OPERATIONS}


def algorithm(
    operation: str,
    name: str | None = None,
    *,
    cost: Cost,
    ordered: bool = False,
    applies: Callable[[Situation], bool] = _always,
    short: bool = False,
    adds: bool = False,
    prepare: Callable[[Any, Any], None] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as an algorithm for `operation`.

        @hpcml.comm.algorithm("allreduce", cost=lambda n, p, m: (p - 1) * (m.alpha + n * m.beta))
        def mine(link, x, out, reduction): ...

    It can then be named in a call (`axis.allreduce(x, algorithm="mine")`), it is chosen where the
    table of measurements says so or, without such a row, its cost is least, and it takes part in
    `hpcml bench collectives` and in the conformance tests (`pytest -p my_module tests/comm`).
    All ranks register the same, before their first mesh. A name that exists is replaced.

    Raises `ValueError` for an operation that is not in `OPERATIONS`.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r} is not one of {', '.join(OPERATIONS)}")

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = name or function.__name__
        _algorithms[operation][own] = Algorithm(
            operation, own, function, cost, ordered, applies, short, adds, prepare
        )
        return function

    return register


def algorithms(operation: str) -> dict[str, Algorithm]:
    """All algorithms registered for an operation, by name."""
    return dict(_algorithms[operation])


def find(operation: str, name: str) -> Algorithm:
    """The algorithm of this name; raises `ValueError` that lists those there are."""
    try:
        return _algorithms[operation][name]
    except KeyError:
        known = ", ".join(sorted(_algorithms[operation]))
        raise ValueError(f"algorithm={name!r}: {operation} has {known}") from None


def span(counts: Any, rank: int) -> slice:
    """The place of a rank's block among blocks of `counts` elements side by side."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])
