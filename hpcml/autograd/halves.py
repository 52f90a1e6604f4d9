"""16-bit floats (bfloat16, float16) in the record: kept in 16 bits, computed with in float32.

CPUs have no fast 16-bit arithmetic, and sums need more than 16 bits anywhere (Micikevicius et al.
2018, "Mixed precision training", section 3.3). So the inputs of a primitive are widened for as long
as it runs and its result is rounded; adjoints likewise. Neither knows of 16-bit types. Primitives
that only move elements (`primitives.movement`) get the 16-bit arrays themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpcml import backend, kernels, memory
from hpcml.backend import Array

if TYPE_CHECKING:
    from hpcml.autograd.record import Context

HALVES = frozenset((backend.dtype("fp16"), backend.dtype("bf16")))
_FLOAT32 = np.dtype(np.float32)


def widened(x: Any) -> Any:
    """x in float32 if it is an array of 16-bit floats; anything else as it is."""
    if getattr(x, "dtype", None) not in HALVES:
        return x
    return kernels.widen(x, _empty_like(x, _FLOAT32))


def narrowed(x: Array, dtype: np.dtype[Any], out: Array | None = None) -> Array:
    """x rounded to the 16-bit `dtype`, in `out` if that is given."""
    return kernels.narrow(x, _empty_like(x, dtype) if out is None else out)


def _empty_like(x: Array, dtype: np.dtype[Any]) -> Array:
    return memory.empty_like(x, dtype, device="cpu" if isinstance(x, np.ndarray) else "cuda")


def through_float32(ctx: Context, arrays: list[Any], attributes: dict[str, Any]) -> Array:
    """Run a primitive's forward on its inputs in float32 and return its result in their type.

    Empties `arrays`. What was saved is kept in 16 bits where it is an input or the result; what
    else a primitive saves (means, logarithms of sums) stays as it is.
    """
    ctx.wide = True
    once = {id(array): widened(array) for array in arrays}
    wide = [once[id(array)] for array in arrays]
    original = {id(w): array for w, array in zip(wide, arrays, strict=True)}
    out = ctx.primitive.forward(ctx, *wide, **attributes)
    assert ctx._saved is not None
    saved = [original.get(id(value), value) for _, value in ctx._saved]
    result = original.get(id(out))
    ctx._saved = ctx._handed = None
    for held in (arrays, once, wide):
        held.clear()  # what was widened would outlive the rounding
    if result is None:
        kind = _result_type(ctx)
        rounds = kind is not None and out.ndim > 0 and out.dtype == _FLOAT32
        result = narrowed(out, kind) if rounds else out  # type: ignore[arg-type]
    ctx._saved = [ctx.entry(result if value is out else value) for value in saved]
    return result


def _result_type(ctx: Context) -> np.dtype[Any] | None:
    """The 16-bit type of all floating inputs; None if they differ. Those without dimensions yield.

    A result without dimensions is a sum or a loss and keeps all its bits.
    """
    pairs = zip(ctx.dtypes, ctx.shapes, strict=True)
    floats = [(kind, shape) for kind, shape in pairs if kind is not None and kind.kind not in "biu"]
    kinds = {kind for kind, shape in floats if shape} or {kind for kind, _ in floats}
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= HALVES else None


def rounded(result: Array, kind: np.dtype[Any], before: Array | None, out: Array | None) -> Array:
    """The gradient of a 16-bit input: `result`, plus `before`, rounded once; in `out`, if given."""
    if before is not None:
        total = widened(before)
        total += widened(result)
        result = total
    return result if result.dtype == kind else narrowed(result, kind, out)
