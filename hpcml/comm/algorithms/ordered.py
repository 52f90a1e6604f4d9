"""Reductions that combine in the order of the ranks: for 16-bit floats and deterministic mode.

Each rank gets the contributions to its block straight from all ranks and combines them in the order
of the ranks, whatever the order in which they came: as many bytes as the bandwidth-optimal
algorithms send, with p - 1 messages instead of log2 p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcml.comm.algorithms.registry import Machine, algorithm, span
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array


def _cost(n: int, p: int, m: Machine) -> float:
    return (p - 1) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)


@algorithm("reduce_scatter", "ordered", cost=_cost, ordered=True)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """Direct exchange of blocks, combined in the order of the ranks.

    (p-1) alpha + (p-1)/p n (beta + gamma); scratch memory of n. The exchange is the pairwise one of
    Thakur, Rabenseifner, Gropp 2005, section 4.3.
    """
    count = counts[link.rank]
    rows: list[Array] = [np.empty(0)] * link.size
    waiting = []
    for step in range(1, link.size):
        source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
        rows[source] = np.empty_like(x, shape=count)
        waiting.append(link.irecv(rows[source], source))
        waiting.append(link.isend(x[span(counts, dest)], dest))
    for message in waiting:
        message.wait()
    rows[link.rank] = x[span(counts, link.rank)]
    reduction.fold(rows, out)
