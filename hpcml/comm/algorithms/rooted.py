"""Reduce, gather and scatter: collectives with a root."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpcml.comm.algorithms import reduce_scatter
from hpcml.comm.algorithms.blocks import branches, rounds, shares, spans, starts
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array


def tree_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of gather and scatter in a tree."""
    return rounds(p) * m.alpha + (p - 1) / p * n * m.beta


def _linear_cost(n: int, p: int, m: Machine) -> float:
    return (p - 1) * m.alpha + (p - 1) / p * n * m.beta


def _whole_cost(n: int, p: int, m: Machine) -> float:
    return rounds(p) * (m.alpha + n * (m.beta + m.gamma))


def _blocks_cost(n: int, p: int, m: Machine) -> float:
    return reduce_scatter.halving_cost(n, p, m) + tree_cost(n, p, m)


@algorithm("reduce", "binomial", cost=_whole_cost)
def binomial_reduce(
    link: Link, x: Array, out: Array | None, reduction: Reduction, root: int
) -> None:
    """Up a tree: ceil(log2 p) (alpha + n (beta + gamma)), for short messages.

    Thakur, Rabenseifner, Gropp 2005, section 4.4. Scratch memory of n, off the root of 2n.
    """
    total, coming = x, None
    for holder, other, low, _ in reversed(list(branches(link, root))):
        if link.rank == other:
            link.send(total, holder)
        elif link.rank == holder:
            if coming is None:
                coming = room(x, x.size)
                out = room(x, x.size) if out is None else out
            assert out is not None
            link.recv(coming, other)
            reduction.fold([total, coming] if holder < low else [coming, total], out)
            total = out


@algorithm("reduce", "rabenseifner", cost=_blocks_cost)
def rabenseifner_reduce(
    link: Link, x: Array, out: Array | None, reduction: Reduction, root: int
) -> None:
    """Reduce-scatter by halving, then gather: 2 log2 p alpha + (p-1)/p n (2 beta + gamma).

    Thakur, Rabenseifner, Gropp 2005, section 4.4. Where p is no power of two, as much more as for
    the reduce-scatter; scratch memory likewise.
    """
    by_blocks(link, x, out, reduction, root, reduce_scatter.recursive_halving)


def by_blocks(
    link: Link,
    x: Array,
    out: Array | None,
    reduction: Reduction,
    root: int,
    scatter: Callable[[Link, Array, Array, Sequence[int], Reduction], None],
) -> None:
    """Reduce by this reduce-scatter and a gather of the blocks."""
    counts = shares(x.size, link.size)
    own = room(x, counts[link.rank])
    if out is not None:
        own = out[spans(counts)[link.rank]]
    scatter(link, x, own, counts, reduction)
    binomial_gather(link, own, out, counts, root)


@algorithm("gather", "binomial", cost=tree_cost)
def binomial_gather(
    link: Link, x: Array, out: Array | None, counts: Sequence[int], root: int
) -> None:
    """Up a tree of neighbouring blocks: ceil(log2 p) alpha + (p-1)/p n beta.

    Thakur, Rabenseifner, Gropp 2005, section 4.4 uses it as a step. Scratch memory of the blocks
    that pass through a rank, none on the root.
    """
    edges, way = starts(counts), list(branches(link, root))
    first, last = _held(way, link)
    held = x if out is None and last - first == 1 else out
    if held is None:
        held = room(x, edges[last] - edges[first])
    if held is not x:
        held[edges[link.rank] - edges[first] :][: x.size] = x
    for holder, other, low, high in reversed(way):
        if link.rank == holder:
            link.recv(held[edges[low] - edges[first] : edges[high] - edges[first]], other)
        elif link.rank == other:
            link.send(held, holder)


@algorithm("scatter", "binomial", cost=tree_cost)
def binomial_scatter(
    link: Link, x: Array | None, out: Array, counts: Sequence[int], root: int
) -> None:
    """Down a tree of neighbouring blocks: ceil(log2 p) alpha + (p-1)/p n beta.

    The scatter of van de Geijn's broadcast (Thakur, Rabenseifner, Gropp 2005, section 4.2).
    Scratch memory of the blocks that pass through a rank, none on the root.
    """
    edges, way = starts(counts), list(branches(link, root))
    first, last = _held(way, link)
    held = out if x is None and last - first == 1 else x
    if held is None:
        held = room(out, edges[last] - edges[first])
    for holder, other, low, high in way:
        if link.rank == holder:
            link.send(held[edges[low] - edges[first] : edges[high] - edges[first]], other)
        elif link.rank == other:
            link.recv(held, holder)
    if held is not out:
        out[...] = held[edges[link.rank] - edges[first] :][: out.size]


def _held(way: Sequence[tuple[int, int, int, int]], link: Link) -> tuple[int, int]:
    """The ranks (first, last + 1) whose blocks pass through this one, itself included."""
    for _, other, low, high in way:
        if link.rank == other:
            return low, high
    return 0, link.size


@algorithm("gather", "linear", cost=_linear_cost)
def linear_gather(
    link: Link, x: Array, out: Array | None, counts: Sequence[int], root: int
) -> None:
    """Straight to the root: (p-1) alpha + (p-1)/p n beta, without scratch memory."""
    if out is None:
        link.send(x, root)
        return
    places = spans(counts)
    others = [rank for rank in range(link.size) if rank != root]
    waiting = [link.irecv(out[places[rank]], rank) for rank in others]
    out[places[root]] = x
    for message in waiting:
        message.wait()


@algorithm("scatter", "linear", cost=_linear_cost)
def linear_scatter(
    link: Link, x: Array | None, out: Array, counts: Sequence[int], root: int
) -> None:
    """Straight from the root: (p-1) alpha + (p-1)/p n beta, without scratch memory."""
    if x is None:
        link.recv(out, root)
        return
    places = spans(counts)
    others = [rank for rank in range(link.size) if rank != root]
    waiting = [link.isend(x[places[rank]], rank) for rank in others]
    out[...] = x[places[root]]
    for message in waiting:
        message.wait()
