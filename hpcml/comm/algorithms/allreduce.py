"""All-reduce: all ranks get the combined buffers, the same bits on each. In any order."""

from __future__ import annotations

from hpcml.comm.algorithms import allgather, reduce_scatter
from hpcml.comm.algorithms.blocks import Cores, is_power, rounds, shares, spans
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array


def _doubling_cost(n: int, p: int, m: Machine) -> float:
    if is_power(p):
        return rounds(p) * (m.alpha + n * (m.beta + m.gamma))
    return 2 * m.alpha + n * (2 * m.beta + m.gamma) + _doubling_cost(n, 1 << (rounds(p) - 1), m)


def _rabenseifner_cost(n: int, p: int, m: Machine) -> float:
    if is_power(p):
        return reduce_scatter.halving_cost(n, p, m) + allgather.doubling_cost(n, p, m)
    uneven = 2 * m.alpha + n * (2 * m.beta + m.gamma)
    return uneven + _rabenseifner_cost(n, 1 << (rounds(p) - 1), m)


def _ring_cost(n: int, p: int, m: Machine) -> float:
    return reduce_scatter.chain_cost(n, p, m) + allgather.ring_cost(n, p, m)


@algorithm("allreduce", cost=_doubling_cost, short=True)
def recursive_doubling(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Exchange the whole in every round: log2 p (alpha + n (beta + gamma)), for short messages.

    Thakur, Rabenseifner, Gropp 2005, section 4.5. Where p is no power of two, ranks combine in
    pairs first and share last: 2 alpha + n (2 beta + gamma) more. Scratch memory of n.
    """
    cores = Cores(link)
    if cores.front is not None:
        link.send(x, cores.front)
        link.recv(out, cores.front)
        return
    total = x
    coming = room(x, x.size)
    if cores.behind is not None:
        link.recv(coming, cores.behind)
        reduction.fold([x, coming], out)
        total = out
    width = 1
    while width < cores.count:
        peer = cores.rank(cores.index ^ width)
        link.exchange(total, peer, coming, peer)
        # In one order on both sides: min, max and NaN depend on it.
        pair = [coming, total] if cores.index & width else [total, coming]
        reduction.fold(pair, out)
        total = out
        width *= 2
    if cores.behind is not None:
        link.send(out, cores.behind)


@algorithm("allreduce", cost=_rabenseifner_cost, short=True)
def rabenseifner(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Reduce-scatter by halving, then all-gather by doubling, for long messages.

    2 log2 p alpha + (p-1)/p n (2 beta + gamma): Thakur, Rabenseifner, Gropp 2005, section 4.5.
    Where p is no power of two: 2 alpha + n (2 beta + gamma) more. Scratch memory as for the
    reduce-scatter.
    """
    cores = Cores(link)
    counts = [0] * link.size
    for index, count in enumerate(shares(x.size, cores.count)):
        counts[cores.rank(index)] = count
    own = out[spans(counts)[link.rank]]
    reduce_scatter.recursive_halving(link, x, own, counts, reduction)
    allgather.recursive_doubling(link, own, out, counts)


@algorithm("allreduce", cost=_ring_cost, adds=True)
def ring(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Reduce-scatter and all-gather around a ring: 2 (p-1) alpha + (p-1)/p n (2 beta + gamma).

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    The reduce-scatter in t turns: (t-1) (p-1) alpha more, and scratch memory of two pieces.
    """
    counts = shares(x.size, link.size)
    own = out[spans(counts)[link.rank]]
    reduce_scatter.ring(link, x, own, counts, reduction)
    allgather.ring(link, own, out, counts)
