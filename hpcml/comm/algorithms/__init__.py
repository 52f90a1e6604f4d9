"""Collective algorithms over point-to-point messages, and which of them serves a call."""

from __future__ import annotations

from hpcml.comm.algorithms import (  # noqa: F401 (they register)
    allgather,
    allreduce,
    alltoall,
    broadcast,
    hierarchical,
    ordered,
    reduce_scatter,
    rooted,
    staged,
    vendor,
)
from hpcml.comm.algorithms.registry import (
    OPERATIONS,
    Algorithm,
    Machine,
    Situation,
    algorithm,
    algorithms,
    find,
    span,
)

__all__ = [
    "OPERATIONS",
    "Algorithm",
    "Machine",
    "Situation",
    "algorithm",
    "algorithms",
    "find",
    "span",
]
