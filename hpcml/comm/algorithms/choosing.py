"""Which algorithm serves a call: the one measured to be fastest, else the least by its cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hpcml.backend import is_half
from hpcml.comm.algorithms import turns
from hpcml.comm.algorithms.blocks import is_power
from hpcml.comm.algorithms.registry import Algorithm, Machine, Situation, algorithms, find
from hpcml.comm.link import Link
from hpcml.comm.staging import on_device
from hpcml.comm.transport import Array

Rows = Sequence[tuple[float, str]]
"""(up to bytes, algorithm), ascending: the first row that is not exceeded counts."""

Table = Mapping[str, Mapping[int, Mapping[str, Rows]]]
"""Rows by place ("node": all ranks share one; "network"), number of ranks and operation."""

NODE = Machine(alpha=3e-6, beta=1.5e-10, gamma=5e-11)
"""Messages through the memory of a node."""
NETWORK = Machine(alpha=3e-5, beta=8e-9, gamma=5e-11)
"""Messages over a network."""
GPU = Machine(alpha=3e-5, beta=1e-10, gamma=1e-12)
"""Messages of memory of GPUs within a node: not measured yet."""


def choose(operation: str, nbytes: int, situation: Situation, table: Table) -> Algorithm:
    """The algorithm for a payload of `nbytes` (as the ledger counts it) in this situation.

    That of the table, if it can serve the call. No long buffer is given to one that takes scratch
    memory of its size, while there is another. Where the table has nothing for this number of
    ranks, or the arrays are of a GPU, the least by cost: the formulas know how costs grow with the
    ranks, which no row for another number does (recursive doubling is the best all-reduce of two
    ranks at any size, and the worst of sixteen).
    """
    fit = fitting(operation, situation)
    assert fit, f"no algorithm for {operation} in {situation}"
    if nbytes > SHORT:
        fit = {name: known for name, known in fit.items() if known.lean(situation.onto)} or fit
    if not situation.device:
        rows = table.get(situation.place, {}).get(situation.size, {}).get(operation, ())
        name = next((name for limit, name in rows if nbytes <= limit), None)
        if name in fit:
            return fit[name]
    machine = GPU if situation.device else NODE
    if situation.spread:
        machine = replace(NETWORK, per_node=situation.per_node)
    return min(fit.values(), key=lambda known: known.cost(nbytes, situation.size, machine))


def fitting(operation: str, situation: Situation) -> dict[str, Algorithm]:
    """The algorithms that can serve a call in this situation, by name."""
    return {
        name: known
        for name, known in algorithms(operation).items()
        if known.applies(situation) and (known.ordered or not situation.ordered)
    }


def named(operation: str, name: str, situation: Situation) -> Algorithm:
    """The algorithm of this name; raises `ValueError` if it is unknown or cannot serve the call."""
    find(operation, name)
    fit = fitting(operation, situation)
    if name not in fit:
        raise ValueError(
            f"algorithm={name!r} cannot do this {operation} ({situation}): "
            f"name one of {', '.join(sorted(fit))}, or none"
        )
    return fit[name]


SHORT = 1 << 19
"""Bytes of a payload up to which scratch memory may be as large (where Thakur, Rabenseifner, Gropp
2005, section 4.3, pass from halving to the pairwise exchange)."""
_REDUCTIONS = ("allreduce", "reduce_scatter", "reduce")
_LONG = 1 << 20
_REMEMBERED = 1000


class Chooser:
    """Chooses for the calls of one link, and remembers what it chose."""

    def __init__(self, link: Link, deterministic: bool) -> None:
        """`deterministic`: reductions combine in the order of the ranks."""
        self._link = link
        self._deterministic = deterministic
        self._chosen: dict[tuple[object, ...], Algorithm] = {}

    def pick(
        self,
        operation: str,
        nbytes: int,
        like: Array,
        even: bool,
        name: str | None,
        onto: bool = False,
    ) -> Algorithm:
        """The algorithm for a payload of `nbytes` of this type and device: the same on all ranks.

        `even`: all ranks know that all counts are equal. Of an all-to-all that is not, each rank
        knows its own counts alone, so that is taken to be a long one. `onto`: a reduction adds to
        what its result holds. Raises `ValueError` if the one that is named cannot do it.
        """
        agreed = even or operation != "alltoall"
        dtype, device = like.dtype, on_device(like)
        key = operation, nbytes if agreed else None, dtype, device, even, name, onto
        chosen = self._chosen.get(key)
        if chosen is None:
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            chosen = self._fresh(operation, nbytes if agreed else None, like, even, name, onto)
            if chosen.prepare is not None:
                chosen.prepare(self._link, dtype)
            self._chosen[key] = chosen
        return chosen

    def scratch(self, nbytes: int, dtype: np.dtype[Any], device: bool) -> int:
        """Bytes for messages that a reduce-scatter of so many takes beside them, at most."""
        size, at_once = self._link.size, self._deterministic or is_half(dtype)
        block = -(-nbytes // (size * dtype.itemsize)) * dtype.itemsize
        if nbytes <= SHORT and size > 1 and not at_once:
            halving = nbytes * (3 if is_power(size) else 6) // 4
            return halving + block  # recursive halving, and its result to be added
        return turns.most(block, size - 1, at_once=at_once, device=device)

    def _fresh(
        self,
        operation: str,
        nbytes: int | None,
        like: Array,
        even: bool,
        name: str | None,
        onto: bool,
    ) -> Algorithm:
        """As `pick`; `nbytes` is None where ranks do not know each other's."""
        if name is not None:  # the caller may know
            count = (nbytes or 0) // like.itemsize
            return named(operation, name, self._situation(operation, count, like, even, onto))
        count = sys.maxsize if nbytes is None else nbytes // like.itemsize
        situation = self._situation(operation, count, like, even, onto)
        size = _LONG if nbytes is None else nbytes
        return choose(operation, size, situation, self._link.table)

    def _situation(
        self, operation: str, count: int, like: Array, even: bool, onto: bool
    ) -> Situation:
        half, on_host = is_half(like.dtype), not on_device(like)
        if not on_host:
            self._link.settle()
        vendor = self._link.vendor
        return Situation(
            nodes=self._link.nodes,
            native=not half,
            ordered=operation in _REDUCTIONS and (self._deterministic or half),
            even=even,
            vendor=on_host and vendor is not None and count <= vendor.limit,
            shared=on_host and self._link.scratch() is not None,
            onto=onto,
            device=not on_host,
        )
