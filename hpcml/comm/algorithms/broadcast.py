"""Broadcast: all ranks get the root's buffer."""

from __future__ import annotations

from hpcml.comm.algorithms import allgather, rooted
from hpcml.comm.algorithms.blocks import branches, rounds, shares, starts
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.transport import Array


def _binomial_cost(n: int, p: int, m: Machine) -> float:
    return rounds(p) * (m.alpha + n * m.beta)


def _blocks_cost(n: int, p: int, m: Machine) -> float:
    return rooted.tree_cost(n, p, m) + allgather.ring_cost(n, p, m)


@algorithm("broadcast", cost=_binomial_cost)
def binomial(link: Link, x: Array, root: int) -> None:
    """In a binomial tree: ceil(log2 p) (alpha + n beta).

    In every round each rank that has the buffer sends it to one that has not
    (Thakur, Rabenseifner, Gropp 2005, section 4.2).
    """
    place = (link.rank - root) % link.size  # the root counts as 0
    reach = 1
    while reach < link.size:
        if place < reach:
            if place + reach < link.size:
                link.send(x, (link.rank + reach) % link.size)
        elif place < 2 * reach:
            link.recv(x, (link.rank - reach) % link.size)
        reach *= 2


@algorithm("broadcast", cost=_blocks_cost)
def scatter_allgather(link: Link, x: Array, root: int) -> None:
    """Scatter blocks, then pass them around: (log2 p + p-1) alpha + 2 (p-1)/p n beta.

    For long messages: van de Geijn's algorithm (Barnett et al. 1994, "Interprocessor collective
    communication library"; Thakur, Rabenseifner, Gropp 2005, section 4.2).
    """
    counts = shares(x.size, link.size)
    edges = starts(counts)
    for holder, other, low, high in branches(link, root):
        if link.rank == holder:
            link.send(x[edges[low] : edges[high]], other)
        elif link.rank == other:
            link.recv(x[edges[low] : edges[high]], holder)
    allgather.ring(link, x[edges[link.rank] : edges[link.rank + 1]], x, counts)
