"""Reductions that combine in the order of the ranks: for 16-bit floats and deterministic mode.

Each rank gets the contributions to its block straight from all ranks and combines them in the order
of the ranks, whatever the order in which they came: as many bytes as the bandwidth-optimal
algorithms send, with p - 1 messages instead of log2 p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpcml.comm.algorithms import allgather, rooted
from hpcml.comm.algorithms.blocks import shares, spans
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.algorithms.turns import ahead, count_of, in_turn, longest, turns, turns_of
from hpcml.comm.link import Link
from hpcml.comm.pieces import Several
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array, Pending


def _scatter_cost(n: int, p: int, m: Machine) -> float:
    return turns_of(n / p, p - 1) * (p - 1) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)


def _allreduce_cost(n: int, p: int, m: Machine) -> float:
    return _scatter_cost(n, p, m) + allgather.ring_cost(n, p, m)


def _reduce_cost(n: int, p: int, m: Machine) -> float:
    return _scatter_cost(n, p, m) + rooted.tree_cost(n, p, m)


def _short_cost(n: int, p: int, m: Machine) -> float:
    return allgather.bruck_cost(n * p, p, m) + (p - 1) * n * m.gamma


@algorithm("reduce_scatter", "ordered", cost=_scatter_cost, ordered=True)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """Direct exchange of blocks, combined in the order of the ranks.

    In t turns: t (p-1) alpha + (p-1)/p n (beta + gamma). The exchange is the pairwise one of
    Thakur, Rabenseifner, Gropp 2005, section 4.3. Scratch memory of two pieces from each of the
    others; where these are several, a piece is so much shorter, down to a quarter.
    """
    others = link.size - 1
    size = longest(counts[link.rank], counts, x, others)
    times = count_of(counts, x, others)
    scratch = in_turn(lambda: [room(x, size) for _ in range(others)], times)
    taken = reduction.scratch_for(x, size, link.size)

    def started() -> Iterator[tuple[list[Array], Array, Pending]]:
        for part, places in turns(counts, x, others):
            own = x[places[link.rank]]
            rows, messages = [own] * link.size, []
            for step, coming in enumerate(next(scratch), 1):
                source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
                rows[source] = coming[: own.size]
                messages.append(link.start(x[places[dest]], dest, rows[source], source))
            yield rows, out[part], Several(messages)

    for rows, target, messages in ahead(started()):
        messages.wait()
        reduction.fold(rows, target, taken)


@algorithm("allreduce", "ordered", cost=_allreduce_cost, ordered=True)
def allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """The reduce-scatter above and a ring all-gather.

    (t+1) (p-1) alpha + (p-1)/p n (2 beta + gamma). Scratch memory as for the reduce-scatter.
    """
    counts = shares(x.size, link.size)
    own = out[spans(counts)[link.rank]]
    reduce_scatter(link, x, own, counts, reduction)
    allgather.ring(link, own, out, counts)


@algorithm("allreduce", "ordered_short", cost=_short_cost, ordered=True, short=True)
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

    (t (p-1) + log2 p) alpha + (p-1)/p n (2 beta + gamma). Scratch memory as for its steps, and of a
    block off the root.
    """
    rooted.by_blocks(link, x, out, reduction, root, reduce_scatter)
