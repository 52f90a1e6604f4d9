"""All-gather: all ranks get the blocks of all, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm.algorithms.blocks import Cores, is_power, rounds, spans, starts
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.pieces import Several
from hpcml.comm.transport import Array


def doubling_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `recursive_doubling`."""
    if is_power(p):
        return rounds(p) * m.alpha + (p - 1) / p * n * m.beta
    cores = 1 << (rounds(p) - 1)
    return 2 * m.alpha + (p + 1) / p * n * m.beta + doubling_cost(n, cores, m)


def bruck_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `bruck`."""
    return rounds(p) * m.alpha + (p - 1) / p * n * m.beta


def ring_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `ring`."""
    return (p - 1) * m.alpha + (p - 1) / p * n * m.beta


@algorithm("allgather", cost=doubling_cost)
def recursive_doubling(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """Double what each rank has in every round: log2 p alpha + (p-1)/p n beta.

    Thakur, Rabenseifner, Gropp 2005, section 4.1. Where p is no power of two, ranks join in pairs
    first and share the whole last: 2 alpha + (p+1)/p n beta more.
    """
    cores, edges = Cores(link), starts(counts)
    if cores.front is not None:
        link.send(x, cores.front)
        link.recv(out, cores.front)
        return

    def blocks(first: int, number: int) -> Array:
        return out[edges[cores.rank(first)] : edges[cores.rank(first + number)]]

    at = edges[link.rank]
    out[at : at + x.size] = x
    if cores.behind is not None:
        link.recv(out[edges[cores.behind] : edges[cores.behind + 1]], cores.behind)
    width = 1
    while width < cores.count:
        own = cores.index // width * width
        peer = cores.rank(cores.index ^ width)
        link.exchange(blocks(own, width), peer, blocks(own ^ width, width), peer)
        width *= 2
    if cores.behind is not None:
        link.send(out, cores.behind)


@algorithm("allgather", cost=bruck_cost)
def bruck(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """Double the blocks in every round, for any p: ceil(log2 p) alpha + (p-1)/p n beta.

    Blocks are collected in the order rank, rank + 1, ..., rank 0 after the last (Bruck et al. 1997,
    "Efficient algorithms for all-to-all communications in multiport message-passing systems";
    Thakur, Rabenseifner, Gropp 2005, section 4.1): here where they belong, so that those on either
    side of the end are two messages, and nothing is copied last.
    """
    size, rank, edges = link.size, link.rank, starts(counts)

    def blocks(first: int, number: int) -> list[Array]:
        first %= size
        end, over = min(first + number, size), first + number - size
        found = [out[edges[first] : edges[end]]]
        return [*found, out[: edges[over]]] if over > 0 else found

    out[edges[rank] : edges[rank + 1]] = x
    have = 1
    while have < size:
        more = min(have, size - have)
        before, after = (rank - have) % size, (rank + have) % size
        messages = [link.irecv(part, after) for part in blocks(after, more)]
        messages += [link.isend(part, before) for part in blocks(rank, more)]
        Several(messages).wait()
        have += more


@algorithm("allgather", cost=ring_cost)
def ring(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """Pass every block around: (p-1) alpha + (p-1)/p n beta, between neighbours alone.

    Thakur, Rabenseifner, Gropp 2005, section 4.1.
    """
    places = spans(counts)
    before, after = (link.rank - 1) % link.size, (link.rank + 1) % link.size
    out[places[link.rank]] = x
    for step in range(link.size - 1):
        leaving = places[(link.rank - step) % link.size]
        coming = places[(before - step) % link.size]
        link.exchange(out[leaving], after, out[coming], before)
