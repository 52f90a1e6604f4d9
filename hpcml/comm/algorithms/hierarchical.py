"""All-reduce in two levels: within the nodes through memory, between them over the network."""

from __future__ import annotations

from hpcml.comm.algorithms.blocks import rounds, shares, spans
from hpcml.comm.algorithms.choosing import NODE, choose
from hpcml.comm.algorithms.registry import Algorithm, Machine, Situation, algorithm
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import on_device
from hpcml.comm.transport import Array


def _cost(n: int, p: int, m: Machine) -> float:
    local, nodes = m.per_node, max(2, p // m.per_node)
    inside = (local - 1) / local * n * (2 * NODE.beta + NODE.gamma)
    short = rounds(nodes) * (m.alpha + n * (m.beta + m.gamma / local))
    rest = (nodes - 1) / nodes * n * (2 * m.beta + m.gamma / local)
    between = min(short, 2 * rounds(nodes) * m.alpha + rest)
    return 2 * rounds(local) * NODE.alpha + inside + between


def _applies(situation: Situation) -> bool:
    return situation.spread and situation.size > len(set(situation.nodes))


@algorithm("allreduce", cost=_cost, applies=_applies)
def hierarchical(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Reduce-scatter in each node, all-reduce of each slice between the nodes, all-gather in each.

    There are as many slices as the smallest of the N nodes has ranks, s; slice i is summed between
    the ranks that are i-th on their nodes. All s of them share the link of their node, over which
    2 (N-1)/N n bytes go each way. With the best algorithms in each step, and constants with ' for
    those within a node: 2 log2 s alpha' + (s-1)/s n (2 beta' + gamma') + 2 log2 N alpha +
    (N-1)/N n (2 beta + gamma/s), or for the last two terms log2 N (alpha + n (beta + gamma/s)) if
    that is less. Scratch memory as for the steps.

    The two-level scheme of Karonis et al. 2000, "Exploiting hierarchy in parallel computer networks
    to optimize collective operation performance", with the slices of Cho et al. 2019, "BlueConnect:
    decomposing all-reduce for deep learning on heterogeneous network hierarchy".
    """
    ranks = range(link.size)
    groups = [[r for r in ranks if link.nodes[r] == node] for node in sorted(set(link.nodes))]
    group = next(group for group in groups if link.rank in group)
    slices, local = min(map(len, groups)), group.index(link.rank)
    counts = [*shares(x.size, slices), *[0] * (len(group) - slices)]
    mine = out[spans(counts)[local]]
    if len(group) > 1:
        node = link.part(group)
        even = slices == len(group) and x.size % slices == 0
        _chosen(node, "reduce_scatter", x, even).run(node, x, mine, counts, reduction)
    elif x is not out:
        out[...] = x
    if local < slices:
        peers = link.part([group[local] for group in groups])
        _chosen(peers, "allreduce", mine).run(peers, mine, mine, reduction)
    if len(group) > 1:
        _chosen(node, "allgather", out, even).run(node, mine, out, counts)


def _chosen(part: Link, operation: str, payload: Array, even: bool = True) -> Algorithm:
    situation = Situation(nodes=part.nodes, even=even, device=on_device(payload))
    return choose(operation, payload.nbytes, situation, part.table)
