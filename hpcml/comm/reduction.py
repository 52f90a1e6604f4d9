"""The arithmetic of a reduction: combining what ranks contribute, for every type they may send.

float32, float64 and integers are combined in their own type. 16-bit floats are combined in float32
and rounded to 16 bits when a result is stored: MPI libraries reduce float16 slowly and do not know
bfloat16 (one takes it for bytes and returns garbage).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml.comm.transport import Array

OPS = ("sum", "prod", "min", "max")
_UFUNCS = {"sum": "add", "prod": "multiply", "min": "minimum", "max": "maximum"}
_BLOCK = 1 << 14
"""Elements combined at once, so that partial results stay in the cache."""


@dataclass(frozen=True)
class Reduction:
    """An operation of `OPS` with its rounding."""

    op: str
    stepwise: bool = False
    """Round 16-bit floats after every addition, as adding one microbatch after the other does;
    otherwise once, after the last."""
    onto: bool = False
    """`fold` combines with what its result holds already, first of all."""

    def into(self, total: Array, x: Array) -> None:
        """total = total op x, in place, element by element; flat arrays of one type."""
        if _is_half(total):
            Reduction(self.op).fold([total, x], total)
        else:
            with _quiet():
                _ufunc(total, self.op)(total, x, out=total)

    def fold(self, rows: Sequence[Array], out: Array) -> None:
        """out = ((rows[0] op rows[1]) op rows[2]) op ...: in this order, whatever the op.

        `out` may be one of the rows. Flat arrays of one type and length.
        """
        rows = [out, *rows] if self.onto else rows
        if len(rows) == 1:
            if rows[0] is not out:
                out[...] = rows[0]
            return
        with _quiet():
            self._fold(rows, out)

    def _fold(self, rows: Sequence[Array], out: Array) -> None:
        half = _is_half(out)
        ufunc = _ufunc(out, self.op)
        if len(rows) == 2 and not half:
            ufunc(rows[0], rows[1], out=out)
            return
        for start in range(0, out.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            total = rows[0][part].astype(np.float32 if half else out.dtype)
            for row in rows[1:]:
                ufunc(total, row[part].astype(np.float32) if half else row[part], out=total)
                if half and self.stepwise:
                    total = total.astype(out.dtype).astype(np.float32)
            out[part] = total


def _quiet() -> np.errstate:
    """No warning of infinities and NaN: they are for the caller to find, as after an MPI call."""
    return np.errstate(over="ignore", invalid="ignore")


def _is_half(x: Array) -> bool:
    return x.dtype.name in ("float16", "bfloat16")


def _ufunc(x: Any, op: str) -> Any:
    """The operation in the array module of `x`: NumPy's or CuPy's."""
    module = np if isinstance(x, np.ndarray) else __import__(type(x).__module__.split(".")[0])
    return getattr(module, _UFUNCS[op])
