"""Reduce-scatter: rank r gets the r-th block of the combined buffers. In any order."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm.algorithms.blocks import Cores, is_power, rounds, spans, starts
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array


def halving_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `recursive_halving`."""
    if is_power(p):
        return rounds(p) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)
    cores = 1 << (rounds(p) - 1)
    uneven = 2 * m.alpha + n * (m.beta + m.gamma) + n / p * m.beta
    return uneven + halving_cost(n, cores, m)


def chain_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `pairwise` and `ring`."""
    return (p - 1) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)


@algorithm("reduce_scatter", cost=halving_cost)
def recursive_halving(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """Halve what is left to combine in every round: log2 p alpha + (p-1)/p n (beta + gamma).

    Thakur, Rabenseifner, Gropp 2005, section 4.3. Where p is no power of two, ranks first combine
    in pairs and last share the result: 2 alpha + n (beta + gamma) + n/p beta more. Scratch memory
    of 3/4 n, of 3/2 n in such a pair.
    """
    cores, edges = Cores(link), starts(counts)
    if cores.front is not None:
        link.send(x, cores.front)
        link.recv(out, cores.front)
        return
    part = x
    if cores.behind is not None:
        part = room(x, x.size)
        link.recv(part, cores.behind)
        reduction.into(part, x)
    low, high = 0, cores.count  # the cores whose blocks `part` holds
    while high - low > 1:
        half = (high - low) // 2
        cut = edges[cores.rank(low + half)] - edges[cores.rank(low)]
        if cores.index < low + half:
            keep, give, peer = part[:cut], part[cut:], cores.rank(cores.index + half)
            high -= half
        else:
            keep, give, peer = part[cut:], part[:cut], cores.rank(cores.index - half)
            low += half
        coming = room(x, keep.size)
        link.exchange(give, peer, coming, peer)
        reduction.into(coming, keep)
        part = coming
    own = counts[link.rank]
    if cores.behind is not None:
        link.send(part[own:], cores.behind)
    out[...] = part[:own]


@algorithm("reduce_scatter", cost=chain_cost)
def pairwise(link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction) -> None:
    """Get one's block from one rank after the other: (p-1) alpha + (p-1)/p n (beta + gamma).

    Thakur, Rabenseifner, Gropp 2005, section 4.3. Scratch memory of one block.
    """
    places = spans(counts)
    total = x[places[link.rank]]
    coming = room(x, total.size)
    for step in range(1, link.size):
        source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
        link.exchange(x[places[dest]], dest, coming, source)
        reduction.fold([total, coming], out)
        total = out


@algorithm("reduce_scatter", cost=chain_cost)
def ring(link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction) -> None:
    """Send sums around a ring, each to its owner: (p-1) alpha + (p-1)/p n (beta + gamma).

    Ranks talk to their neighbours alone (the first half of the ring all-reduce of Patarasuk and
    Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
    Scratch memory of two blocks.
    """
    places = spans(counts)
    before, after = (link.rank - 1) % link.size, (link.rank + 1) % link.size
    leaving = x[places[before]]
    for step in range(2, link.size + 1):
        block = (link.rank - step) % link.size
        coming = room(x, counts[block])
        link.exchange(leaving, after, coming, before)
        last = step == link.size
        reduction.fold([coming, x[places[block]]], out if last else coming)
        leaving = coming
