"""All-to-all: block s of rank r becomes block r of rank s."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm.algorithms.blocks import rounds, spans
from hpcml.comm.algorithms.registry import Machine, Situation, algorithm
from hpcml.comm.link import Link
from hpcml.comm.staging import room
from hpcml.comm.transport import Array


def _pairwise_cost(n: int, p: int, m: Machine) -> float:
    return (p - 1) * m.alpha + (p - 1) / p * n * m.beta


def _bruck_cost(n: int, p: int, m: Machine) -> float:
    return rounds(p) * (m.alpha + n / 2 * m.beta)


def _even(situation: Situation) -> bool:
    return situation.even


@algorithm("alltoall", cost=_pairwise_cost)
def pairwise(
    link: Link, x: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
) -> None:
    """One partner after the other: (p-1) alpha + (p-1)/p n beta, for long messages.

    Thakur, Rabenseifner, Gropp 2005, section 4.6.
    """
    leaving, coming = spans(sends), spans(receives)
    out[coming[link.rank]] = x[leaving[link.rank]]
    for step in range(1, link.size):
        source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
        link.exchange(x[leaving[dest]], dest, out[coming[source]], source)


@algorithm("alltoall", cost=_bruck_cost, applies=_even, short=True)
def bruck(link: Link, x: Array, out: Array, sends: Sequence[int], receives: Sequence[int]) -> None:
    """Blocks travel by powers of two: ceil(log2 p) (alpha + n/2 beta), for short messages.

    In round k all blocks whose way has bit k set go 2^k ranks further (Bruck et al. 1997; Thakur,
    Rabenseifner, Gropp 2005, section 4.6). Equal blocks only. Scratch memory of 2n.
    """
    size, rank, places = link.size, link.rank, spans(sends)
    way = room(x, x.size)  # block i is the one that has i ranks to go
    for offset in range(size):
        way[places[offset]] = x[places[(rank + offset) % size]]
    step = 1
    while step < size:
        moving = [places[offset] for offset in range(size) if offset & step]
        both = room(x, 2 * len(moving) * sends[0])
        leaving, coming = both[: both.size // 2], both[both.size // 2 :]
        for place, block in zip(places, moving, strict=False):
            leaving[place] = way[block]
        link.exchange(leaving, (rank + step) % size, coming, (rank - step) % size)
        for place, block in zip(places, moving, strict=False):
            way[block] = coming[place]
        step *= 2
    for offset in range(size):
        out[places[(rank - offset) % size]] = way[places[offset]]
