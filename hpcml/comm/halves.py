"""Reductions of float16 and bfloat16: moved as 16-bit words, added in float32, rounded once.

MPI libraries reduce float16 slowly and do not know bfloat16 (one takes it for bytes and returns
garbage), so the type never reaches them. Each rank receives its block from all ranks, combines the
contributions in the order of the ranks in float32 and rounds the result: the same bits whatever
the library, with as many bytes sent as the best float algorithm of 16 bits would send.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hpcml.comm.transport import Array, Transport

_Gather = Callable[[Array, Array], None]
_COMBINE: dict[str, Any] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


def allreduce(transport: Transport, source: Array, target: Array, op: str) -> None:
    """Combine over all ranks into `target` on each; they may be the same array."""
    block = _own_block(transport, _padded(source, transport.size), op)
    _collect(block, target, transport.allgather, transport.size)


def reduce(transport: Transport, source: Array, target: Array | None, op: str, root: int) -> None:
    """Combine over all ranks into the root's `target`, which is None elsewhere."""
    block = _own_block(transport, _padded(source, transport.size), op)
    if target is None:
        transport.gather(block.view(np.uint16), None, root)
    else:
        _collect(block, target, partial(transport.gather, root=root), transport.size)


def reduce_scatter(transport: Transport, source: Array, target: Array, op: str) -> None:
    """Combine over all ranks; rank r's `target` gets the r-th of equal blocks."""
    target.reshape(-1)[...] = _own_block(transport, source.reshape(-1), op)


def _own_block(transport: Transport, source: Array, op: str) -> Array:
    received = np.empty_like(source)
    transport.alltoall(source.view(np.uint16), received.view(np.uint16))
    contributions = received.reshape(transport.size, -1)
    total = contributions[0].astype(np.float32)
    # Overflow to infinity is the value of the result, as it would be in any MPI reduction.
    with np.errstate(over="ignore", invalid="ignore"):
        for contribution in contributions[1:]:
            _COMBINE[op](total, contribution.astype(np.float32), out=total)
        rounded: Array = total.astype(source.dtype)
    return rounded


def _padded(source: Array, size: int) -> Array:
    flat = source.reshape(-1)
    missing = -flat.size % size
    return np.concatenate([flat, np.zeros(missing, flat.dtype)]) if missing else flat


def _collect(block: Array, target: Array, gather: _Gather, size: int) -> None:
    """Join the blocks of all ranks in `target`, less what was padded."""
    flat = target.reshape(-1)
    joined = flat if flat.size == block.size * size else np.empty(block.size * size, flat.dtype)
    gather(block.view(np.uint16), joined.view(np.uint16))
    if joined is not flat:
        flat[...] = joined[: flat.size]
