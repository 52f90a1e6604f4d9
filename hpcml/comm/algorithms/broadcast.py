"""Broadcast: all ranks get the root's buffer."""

from __future__ import annotations

from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.link import Link
from hpcml.comm.transport import Array


def _binomial_cost(n: int, p: int, m: Machine) -> float:
    return (p - 1).bit_length() * (m.alpha + n * m.beta)


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
