"""The collectives of the MPI library itself, each as one more algorithm.

What the library does inside cannot be seen: the costs are those of the best standard algorithm
(Thakur, Rabenseifner, Gropp 2005) with less overhead for a message, and the bytes that the ledger
counts are those for long messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hpcml.comm.algorithms.blocks import rounds
from hpcml.comm.algorithms.registry import Machine, Situation, algorithm, find, span
from hpcml.comm.buffers import wire
from hpcml.comm.ledger import volume
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array, Vendor


def _reduces(situation: Situation) -> bool:
    return situation.vendor and situation.native


def _moves(situation: Situation) -> bool:
    return situation.vendor


def _less_overhead(m: Machine) -> Machine:
    """Messages that are started in C, not in Python, in about half the time."""
    return replace(m, alpha=m.alpha / 2)


def _reducing_all(n: int, p: int, m: Machine) -> float:
    m = _less_overhead(m)
    short = rounds(p) * (m.alpha + n * (m.beta + m.gamma))
    return min(short, 2 * rounds(p) * m.alpha + (p - 1) / p * n * (2 * m.beta + m.gamma))


def _reducing(n: int, p: int, m: Machine) -> float:
    return rounds(p) * m.alpha / 2 + (p - 1) / p * n * (m.beta + m.gamma)


def _moving(n: int, p: int, m: Machine) -> float:
    return rounds(p) * m.alpha / 2 + (p - 1) / p * n * m.beta


def _broadcasting(n: int, p: int, m: Machine) -> float:
    m = _less_overhead(m)
    long = (rounds(p) + p - 1) * m.alpha + 2 * (p - 1) / p * n * m.beta
    return min(rounds(p) * (m.alpha + n * m.beta), long)


def _exchanging(n: int, p: int, m: Machine) -> float:
    m = _less_overhead(m)
    short = rounds(p) * (m.alpha + n / 2 * m.beta)
    return min(short, (p - 1) * m.alpha + (p - 1) / p * n * m.beta)


def _may_lose_nan(x: Array, reduction: Reduction) -> bool:
    """Whether MPI leaves open what becomes of NaN, and libraries give some ranks other values."""
    return x.dtype.kind == "f" and reduction.op in ("min", "max")


def _library(link: Link) -> Vendor:
    assert link.vendor is not None, "the algorithm does not apply"
    return link.vendor


def _count(link: Link, operation: str, payload: int, forwards: bool = True) -> None:
    """Take the bytes of the standard algorithm as sent, to the next rank around."""
    sent = volume(operation, payload, link.size, forwards)
    link.count(sent, (link.rank + 1) % link.size)


@algorithm("allreduce", "vendor", cost=_reducing_all, applies=_reduces)
def allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """`MPI_Allreduce`; minimum and maximum of floats by messages, so that no NaN is lost."""
    if _may_lose_nan(x, reduction):
        find("allreduce", "recursive_doubling").run(link, x, out, reduction)
        return
    _count(link, "all_reduce", x.nbytes)
    _library(link).allreduce(x, out, reduction.op)


@algorithm("reduce_scatter", "vendor", cost=_reducing, applies=_reduces)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """`MPI_Reduce_scatter` (of equal blocks: `MPI_Reduce_scatter_block`), or as for all-reduce."""
    if _may_lose_nan(x, reduction):
        find("reduce_scatter", "pairwise").run(link, x, out, counts, reduction)
        return
    _count(link, "reduce_scatter", x.nbytes)
    _library(link).reduce_scatter(x, out, counts, reduction.op)


@algorithm("allgather", "vendor", cost=_moving, applies=_moves)
def allgather(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """`MPI_Allgather`, of uneven blocks `MPI_Allgatherv`."""
    _count(link, "all_gather", out.nbytes)
    _library(link).allgather(wire(x), wire(out), counts)


@algorithm("broadcast", "vendor", cost=_broadcasting, applies=_moves)
def broadcast(link: Link, x: Array, root: int) -> None:
    """`MPI_Bcast`."""
    _count(link, "broadcast", x.nbytes, link.rank != (root - 1) % link.size)
    _library(link).broadcast(wire(x), root)


@algorithm("reduce", "vendor", cost=_reducing_all, applies=_reduces)
def reduce(link: Link, x: Array, out: Array | None, reduction: Reduction, root: int) -> None:
    """`MPI_Reduce`, or as for all-reduce."""
    if _may_lose_nan(x, reduction):
        find("reduce", "binomial").run(link, x, out, reduction, root)
        return
    _count(link, "reduce", x.nbytes, link.rank != root)
    _library(link).reduce(x, out, reduction.op, root)


@algorithm("gather", "vendor", cost=_moving, applies=_moves)
def gather(link: Link, x: Array, out: Array | None, counts: Sequence[int], root: int) -> None:
    """`MPI_Gather`, of uneven blocks `MPI_Gatherv`."""
    link.count(x.nbytes if link.rank != root else 0, root)
    _library(link).gather(wire(x), None if out is None else wire(out), counts, root)


@algorithm("scatter", "vendor", cost=_moving, applies=_moves)
def scatter(link: Link, x: Array | None, out: Array, counts: Sequence[int], root: int) -> None:
    """`MPI_Scatter`, of uneven blocks `MPI_Scatterv`."""
    if x is not None:
        itemsize = out.dtype.itemsize
        for rank in range(link.size):
            part = span(counts, rank)
            link.count((part.stop - part.start) * itemsize if rank != root else 0, rank)
    _library(link).scatter(None if x is None else wire(x), wire(out), counts, root)


@algorithm("alltoall", "vendor", cost=_exchanging, applies=_moves)
def alltoall(
    link: Link, x: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
) -> None:
    """`MPI_Alltoallv`."""
    for rank in range(link.size):
        link.count(sends[rank] * x.dtype.itemsize if rank != link.rank else 0, rank)
    _library(link).alltoall(wire(x), wire(out), sends, receives)
