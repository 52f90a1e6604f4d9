"""The collectives of the MPI library itself, each as one more algorithm.

What the library does inside cannot be seen: the costs are those of the standard algorithms for long
messages, and so are the bytes that the ledger counts for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm.algorithms.registry import Machine, Situation, algorithm, span
from hpcml.comm.ledger import volume
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.transport import Array, Vendor


def _reduces(situation: Situation) -> bool:
    return situation.vendor and situation.native


def _moves(situation: Situation) -> bool:
    return situation.vendor


def _twice(n: int, p: int, m: Machine) -> float:
    return 2 * (p - 1) * m.alpha + 2 * (p - 1) / p * n * m.beta + (p - 1) / p * n * m.gamma


def _once(n: int, p: int, m: Machine) -> float:
    return (p - 1) * m.alpha + (p - 1) / p * n * m.beta


def _reducing(n: int, p: int, m: Machine) -> float:
    return _once(n, p, m) + (p - 1) / p * n * m.gamma


def _library(link: Link) -> Vendor:
    if link.vendor is None:
        raise ValueError('algorithm="vendor" needs MPI: these ranks have no library of their own')
    return link.vendor


def _count(link: Link, operation: str, payload: int, forwards: bool = True) -> None:
    """Take the bytes of the standard algorithm as sent, to the next rank around."""
    sent = volume(operation, payload, link.size, forwards)
    link.count(sent, (link.rank + 1) % link.size)


@algorithm("allreduce", "vendor", cost=_twice, applies=_reduces)
def allreduce(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """`MPI_Allreduce`."""
    _count(link, "all_reduce", x.nbytes)
    _library(link).allreduce(x, out, reduction.op)


@algorithm("reduce_scatter", "vendor", cost=_reducing, applies=_reduces)
def reduce_scatter(
    link: Link, x: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> None:
    """`MPI_Reduce_scatter` (of equal blocks: `MPI_Reduce_scatter_block`)."""
    _count(link, "reduce_scatter", x.nbytes)
    _library(link).reduce_scatter(x, out, counts, reduction.op)


@algorithm("allgather", "vendor", cost=_once, applies=_moves)
def allgather(link: Link, x: Array, out: Array, counts: Sequence[int]) -> None:
    """`MPI_Allgather`, of uneven blocks `MPI_Allgatherv`."""
    _count(link, "all_gather", out.nbytes)
    _library(link).allgather(x, out, counts)


@algorithm("broadcast", "vendor", cost=lambda n, p, m: 2 * _once(n, p, m), applies=_moves)
def broadcast(link: Link, x: Array, root: int) -> None:
    """`MPI_Bcast`."""
    _count(link, "broadcast", x.nbytes, link.rank != (root - 1) % link.size)
    _library(link).broadcast(x, root)


@algorithm("reduce", "vendor", cost=_twice, applies=_reduces)
def reduce(link: Link, x: Array, out: Array | None, reduction: Reduction, root: int) -> None:
    """`MPI_Reduce`."""
    _count(link, "reduce", x.nbytes, link.rank != root)
    _library(link).reduce(x, out, reduction.op, root)


@algorithm("gather", "vendor", cost=_once, applies=_moves)
def gather(link: Link, x: Array, out: Array | None, counts: Sequence[int], root: int) -> None:
    """`MPI_Gather`, of uneven blocks `MPI_Gatherv`."""
    link.count(x.nbytes if link.rank != root else 0, root)
    _library(link).gather(x, out, counts, root)


@algorithm("scatter", "vendor", cost=_once, applies=_moves)
def scatter(link: Link, x: Array | None, out: Array, counts: Sequence[int], root: int) -> None:
    """`MPI_Scatter`, of uneven blocks `MPI_Scatterv`."""
    if x is not None:
        itemsize = out.dtype.itemsize
        for rank in range(link.size):
            part = span(counts, rank)
            link.count((part.stop - part.start) * itemsize if rank != root else 0, rank)
    _library(link).scatter(x, out, counts, root)


@algorithm("alltoall", "vendor", cost=_once, applies=_moves)
def alltoall(
    link: Link, x: Array, out: Array, sends: Sequence[int], receives: Sequence[int]
) -> None:
    """`MPI_Alltoallv`."""
    for rank in range(link.size):
        link.count(sends[rank] * x.dtype.itemsize if rank != link.rank else 0, rank)
    _library(link).alltoall(x, out, sends, receives)
