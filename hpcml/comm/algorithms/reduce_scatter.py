"""Reduce-scatter: rank r gets the r-th block of the combined buffers. In any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpcml.comm.algorithms.blocks import Cores, is_power, rounds, starts
from hpcml.comm.algorithms.registry import Machine, algorithm
from hpcml.comm.algorithms.turns import ahead, count_of, in_turn, longest, turns, turns_of
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.staging import room
from hpcml.comm.transport import Array, Pending


def halving_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `recursive_halving`."""
    if is_power(p):
        return rounds(p) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)
    cores = 1 << (rounds(p) - 1)
    uneven = 2 * m.alpha + n * (m.beta + m.gamma) + n / p * m.beta
    return uneven + halving_cost(n, cores, m)


def chain_cost(n: int, p: int, m: Machine) -> float:
    """Seconds of `pairwise` and `ring`."""
    return turns_of(n / p) * (p - 1) * m.alpha + (p - 1) / p * n * (m.beta + m.gamma)


@algorithm("reduce_scatter", cost=halving_cost, short=True)
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


@algorithm("reduce_scatter", cost=chain_cost, adds=True)
def pairwise(link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction) -> None:
    """Get one's block from one rank after the other: t (p-1) alpha + (p-1)/p n (beta + gamma).

    Thakur, Rabenseifner, Gropp 2005, section 4.3; in t turns. Scratch memory of two pieces.
    """
    size = longest(counts[link.rank], counts, x)
    scratch = in_turn(lambda: room(x, size), count_of(counts, x) * (link.size - 1))
    taken = reduction.scratch_for(x, size, 2)

    def started() -> Iterator[tuple[int, Array, Array, Array, Pending]]:
        for part, places in turns(counts, x):
            own, target = x[places[link.rank]], out[part]
            for step in range(1, link.size):
                source, dest = (link.rank - step) % link.size, (link.rank + step) % link.size
                coming = next(scratch)[: own.size]
                messages = link.start(x[places[dest]], dest, coming, source)
                yield step, own, coming, target, messages

    for step, own, coming, target, messages in ahead(started()):
        messages.wait()
        if step == 1:
            reduction.fold([own, coming], target, taken)
        else:
            reduction.into(target, coming)


@algorithm("reduce_scatter", cost=chain_cost, adds=True)
def ring(link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction) -> None:
    """Send sums around a ring, each to its owner: t (p-1) alpha + (p-1)/p n (beta + gamma).

    Ranks talk to their neighbours alone (the first half of the ring all-reduce of Patarasuk and
    Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). In t turns
    of which the next begins before the last sums of one are made. Scratch memory of two pieces,
    of four that are shorter among more than two ranks.
    """
    rank, before, after = link.rank, (link.rank - 1) % link.size, (link.rank + 1) % link.size
    rows = min(2, link.size - 1)
    size = longest(max(counts), counts, x, rows)
    times = count_of(counts, x, rows)
    first, further = (in_turn(lambda: room(x, size), n) for n in (times, times * (link.size - 2)))
    taken = reduction.scratch_for(x, size, 2)

    def begun() -> Iterator[tuple[slice, list[slice], Array, Pending]]:
        for part, places in turns(counts, x, rows):
            coming = next(first)[: _length(places[rank - 2])]
            yield part, places, coming, link.start(x[places[before]], after, coming, before)

    for part, places, coming, messages in ahead(begun()):
        messages.wait()
        for step in range(2, link.size):
            reduction.into(coming, x[places[rank - step]])
            leaving, coming = coming, next(further)[: _length(places[rank - step - 1])]
            link.exchange(leaving, after, coming, before)
        reduction.fold([coming, x[places[rank]]], out[part], taken)


def _length(place: slice) -> int:
    count: int = place.stop - place.start
    return count
