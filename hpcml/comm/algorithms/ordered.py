"""Reductions that combine in the order of the ranks: for 16-bit floats and deterministic mode.

Each rank gets the contributions to its block straight from all ranks and combines them in the order
of the ranks, whatever the order in which they came: as many bytes as the bandwidth-optimal
algorithms send, with p - 1 messages instead of log2 p.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm.algorithms import allgather, rooted
from hpcml.comm.algorithms import reduce_scatter as unordered
from hpcml.comm.algorithms.blocks import shares, spans
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array


def _allreduce_cost(n: int, p: int, m: Machine) -> float:
    return unordered.chain_cost(n, p, m) + allgather.ring_cost(n, p, m)


def _reduce_cost(n: int, p: int, m: Machine) -> float:
    return unordered.chain_cost(n, p, m) + rooted.tree_cost(n, p, m)


def _short_cost(n: int, p: int, m: Machine) -> float:
    return allgather.bruck_cost(n * p, p, m) + (p - 1) * n * m.gamma


@algorithm("reduce_scatter", "ordered", cost=unordered.chain_cost, ordered=True)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """Direct exchange of blocks, combined in the order of the ranks.

    (p-1) alpha + (p-1)/p n (beta + gamma); scratch memory of n. The exchange is the pairwise one of
    Thakur, Rabenseifner, Gropp 2005, section 4.3.
    """
    places = spans(counts)
    rows = [x[places[link.rank]]] * link.size
    waiting = []
    for step in range(1, link.size):
        source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
        rows[source] = room(x, counts[link.rank])
        waiting.append(link.irecv(rows[source], source))
        waiting.append(link.isend(x[places[dest]], dest))
    for message in waiting:
        message.wait()
    reduction.fold(rows, out)


@algorithm("allreduce", "ordered", cost=_allreduce_cost, ordered=True)
def allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """The reduce-scatter above and a ring all-gather: 2 (p-1) alpha + (p-1)/p n (2 beta + gamma).

    Scratch memory of n.
    """
    counts = shares(x.size, link.size)
    own = out[spans(counts)[link.rank]]
    reduce_scatter(link, x, own, counts, reduction)
    allgather.ring(link, own, out, counts)


@algorithm("allreduce", "ordered_short", cost=_short_cost, ordered=True)
def short_allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """All contributions to all ranks, combined by each: log2 p alpha + (p-1) n (beta + gamma).

    For short messages, which cost the number of messages (Bruck's all-gather: Thakur, Rabenseifner,
    Gropp 2005, section 4.1). Scratch memory of 2 p n.
    """
    counts = [x.size] * link.size
    rows = room(x, sum(counts))
    allgather.bruck(link, x, rows, counts)
    reduction.fold([rows[place] for place in spans(counts)], out)


@algorithm("reduce", "ordered", cost=_reduce_cost, ordered=True)
def reduce(link: Link, x: Array, out: Array | None, reduction: Reduction, root: int) -> None:
    """The reduce-scatter above, then a gather in a tree.

    (p-1 + log2 p) alpha + (p-1)/p n (2 beta + gamma); scratch memory of n.
    """
    rooted.by_blocks(link, x, out, reduction, root, reduce_scatter)
