"""The arithmetic of a reduction: combining what ranks contribute, for every type they may send.

float32, float64 and integers are combined in their own type. 16-bit floats are combined in float32
and rounded to 16 bits when a result is stored: MPI libraries reduce float16 slowly and do not know
bfloat16 (one takes it for bytes and returns garbage).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml.backend import is_half, xp
from hpcml.comm.staging import on_device, room
from hpcml.comm.transport import Array
from hpcml.kernels import narrow, widen

OPS = ("sum", "prod", "min", "max")
_UFUNCS = {"sum": "add", "prod": "multiply", "min": "minimum", "max": "maximum"}
_BLOCK = 1 << 14
"""Elements combined at once, so that partial results stay in the cache."""
_DEVICE_BLOCK = 1 << 22
"""The same on a GPU, where each step starts a kernel: what bounds the memory that this takes."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """An operation of `OPS` with its rounding. See `reduction`."""

    op: str
    stepwise: bool = False
    """Round 16-bit floats after every addition, as adding one microbatch after the other does;
    otherwise once, after the last."""
    onto: bool = False
    """`fold` combines with what its result holds already, first of all."""

    def into(self, total: Array, x: Array) -> None:
        """total = total op x, in place, element by element; flat arrays of one type."""
        self._fold([total, x], total, self._taken(total, total.size, 2))

    def fold(self, rows: Sequence[Array], out: Array, taken: Sequence[Array] | None = None) -> None:
        """out = ((rows[0] op rows[1]) op rows[2]) op ...: in this order, whatever the op.

        `out` may be one of the rows. Flat arrays of one type and length. taken: of `scratch_for`,
        where messages are under way.
        """
        rows = [out, *rows] if self.onto else rows
        if len(rows) > 1:
            self._fold(rows, out, self._taken(out, out.size, len(rows)) if taken is None else taken)
        elif rows[0] is not out:
            out[...] = rows[0]

    def scratch_for(self, like: Array, count: int, rows: int) -> list[Array]:
        """What `fold` of so many rows of at most `count` elements takes, before the first message.

        For one that is under way when memory is refused nobody would wait. Raises MemoryLimitError.
        """
        return self._taken(like, count, rows + self.onto)

    def _taken(self, like: Array, count: int, rows: int) -> list[Array]:
        block = min(_block(like), count)
        if is_half(like.dtype):
            wide = [room(like, block, np.float32) for _ in range(2)]
            return [*wide, room(like, block)]  # a result's own place may be a row to be read yet
        return [room(like, block)] if rows > 2 else []

    def _fold(self, rows: Sequence[Array], out: Array, taken: Sequence[Array]) -> None:
        with _quiet():
            if is_half(out.dtype):
                self._fold_halves(rows, out, *taken)
                return
            ufunc = getattr(xp(out), _UFUNCS[self.op])
            if len(rows) == 2:
                ufunc(rows[0], rows[1], out=out)
                return
            block, (total,) = _block(out), taken
            for start in range(0, out.size, block):
                part = slice(start, min(start + block, out.size))
                here = total[: part.stop - start]
                ufunc(rows[0][part], rows[1][part], out=here)
                for row in rows[2:]:
                    ufunc(here, row[part], out=here)
                out[part] = here

    def _fold_halves(
        self, rows: Sequence[Array], out: Array, total: Array, x: Array, words: Array
    ) -> None:
        ufunc = getattr(xp(out), _UFUNCS[self.op])
        block = _block(out)
        for start in range(0, out.size, block):
            part = slice(start, min(start + block, out.size))
            here, other, word = (array[: part.stop - start] for array in (total, x, words))
            widen(rows[0][part], here)
            for row in rows[1:]:
                widen(row[part], other)
                ufunc(here, other, out=here)
                if self.stepwise:
                    narrow(here, word)
                    widen(word, here)
            narrow(here, out[part])


def scratch(count: int, dtype: np.dtype[Any], device: bool) -> int:
    """Bytes that combining blocks of so many elements takes beside them, at most."""
    block = min(count, _DEVICE_BLOCK if device else _BLOCK)
    return block * (4 + 4 + 2 if is_half(dtype) else dtype.itemsize)


def _block(out: Array) -> int:
    return _DEVICE_BLOCK if on_device(out) else _BLOCK


def _quiet() -> np.errstate:
    """No warning of infinities and NaN: they are for the caller to find, as after an MPI call."""
    return np.errstate(over="ignore", invalid="ignore")


@functools.cache
def reduction(op: str, stepwise: bool = False, onto: bool = False) -> Reduction:
    """The one `Reduction` of these properties."""
    return Reduction(op, stepwise, onto)
