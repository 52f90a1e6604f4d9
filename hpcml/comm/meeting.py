"""Where the ranks of a node meet: flags in memory they share, each on cache lines of its own.

With its flag a rank shows what it is about to do, so that calls which do not fit together are found
out at no cost.
"""

from __future__ import annotations

import functools
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.comm.buffers import DTYPES
from hpcml.comm.fold import adds_floats, adds_halves
from hpcml.comm.link import Link
from hpcml.comm.reduction import OPS, Reduction
from hpcml.comm.transport import Array

_SPINS, _YIELDS = 2000, 500
NAP = 50e-6
"""Seconds between looks for a rank that is late."""

Call = tuple[str, str, str]
CALLS: list[Call] = [
    (operation, op, dtype)
    for operation in ("allreduce", "reduce_scatter")
    for op in OPS
    for dtype in DTYPES
] + [(operation, "", dtype) for operation in ("allgather", "broadcast") for dtype in DTYPES]
"""Operation, op and type of every call there is: ranks compare the numbers of theirs."""
NUMBERS = {call: number for number, call in enumerate(CALLS)}


Place = tuple[int, int, int, int]
"""Number of the window, first element in it, number of elements, number of the call."""


def patience(ranks: int) -> tuple[int, int]:
    """How often each of so many ranks of a node looks for others: in a loop, then yielding."""
    return 0 if ranks > (os.cpu_count() or 1) else _SPINS, _YIELDS


class Meeting:
    """The flags at which the ranks of one node meet in one stream of collectives.

    Made by all of them together, at the first call that finds its memory in a window.
    """

    def __init__(self, local: Link, region: mmap.mmap) -> None:
        """Flags of the ranks of `local` in a page or more of memory that they share, all zero."""
        self.ranks, self.members = (local.size, local.rank), local.members
        shared = _shared(np.dtype(np.float32))
        self._begin, self._meet, self._stride = shared.begin, shared.meet, shared.FLAGS
        self._store = shared.store_together
        self.flags: Array = np.frombuffer(region, np.int64)
        self.epoch = 0
        self._broken: str | None = None
        self.patience = patience(local.size)

    def begin(self, call: Place) -> None:
        """Meet at the start of a call; raises `ValueError` if the ranks do not call the same.

        They meet once more (`meet`) before the call is over. After such an error the ranks may be
        at different calls, so every later one raises it again.
        """
        self._check()
        self.epoch += 1
        while True:
            late = self._begin(self.flags, *self.ranks, self.epoch, *self.patience, *call)
            if late == -1:
                return
            if late == -2:
                self._mismatch()
            time.sleep(NAP)

    def meet(self) -> None:
        """Return when all ranks of the node have come here; what they wrote before is visible."""
        self._check()
        self.epoch += 1
        while self._meet(self.flags, *self.ranks, self.epoch, *self.patience) >= 0:
            time.sleep(NAP)

    def adder(self, reduction: Reduction, dtype: np.dtype[Any]) -> Callable[..., None] | None:
        """`begin`, a sum as that of `fold_of`, and `meet` in one compiled call, if there is one.

        The function takes the place of the call and the arguments of the fold.
        """
        onto = (reduction.onto,)
        if adds_floats(reduction, dtype):
            return partial(self._add, _shared(dtype).sum_together, onto)
        if adds_halves(reduction, dtype):
            kernel = _shared(np.dtype(np.float32)).sum_half_together
            return partial(self._add, kernel, (*onto, dtype.name == "bfloat16", reduction.stepwise))
        return None

    def _add(self, kernel: Any, how: tuple[bool, ...], call: Place, *arguments: Any) -> None:
        self._together(kernel, call, *arguments, *how)

    def store(self, call: Place, rows: Array, first: int, x: Array, home: bool) -> None:
        """`begin`, the storing of bytes that `store_together` of the kernels does, and `meet`."""
        self._together(self._store, call, rows, first, x, home)

    def _together(self, kernel: Any, call: Place, *arguments: Any) -> None:
        self._check()
        self.epoch += 2
        fixed = (self.flags, *self.ranks, self.epoch - 1, *self.patience, *call)
        late = kernel(*fixed, False, *arguments)
        while late != -1:
            if late == -2:
                self._mismatch()
            time.sleep(NAP)
            late = kernel(*fixed, late >= self.ranks[0], *arguments)

    def by_way(self, kernel: Any, meetings: int, *arguments: Any) -> None:
        """A kernel of `hpcml.kernels.cpu.staged` with so many meetings."""
        if self._broken is not None:
            self._check()
        fixed = (self.flags, *self.ranks, self.epoch + 1, *self.patience)
        self.epoch += meetings
        late = kernel(*fixed, 0, *arguments)
        while late != -1:
            time.sleep(NAP)
            late = kernel(*fixed, late // self.ranks[0] + 1, *arguments)

    def _check(self) -> None:
        if self._broken is not None:
            raise ValueError(self._broken)

    def _mismatch(self) -> None:
        rows = self.flags.reshape(-1, self._stride)[: self.ranks[0], 1:5].tolist()
        shown = "; ".join(
            f"rank {member} calls {' '.join(CALLS[code])} of {count} elements from element "
            f"{column} of window {number} on"
            for member, (number, column, count, code) in zip(self.members, rows, strict=True)
        )
        self._broken = (
            f"ranks must call the same operation on the same place of shared memory: {shown}"
        )
        self._check()


@functools.cache
def _shared(dtype: np.dtype[Any]) -> ModuleType:
    """The compiled loops for this float type, which are loaded when one is first summed."""
    module: ModuleType = kernels.compiled(dtype.name).shared
    return module
