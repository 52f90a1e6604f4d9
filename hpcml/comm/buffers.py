"""Checks of what callers hand to an axis: types, shapes, contiguity, overlap."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.backend import is_half, xp
from hpcml.comm.reduction import OPS
from hpcml.comm.staging import as_array, on_device, room
from hpcml.comm.transport import Array

Shape = tuple[int, ...]

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)


def wire(x: Array) -> Array:
    """The same memory as a type that all carriers know: 16-bit floats as uint16, bool as uint8."""
    if is_half(x.dtype):
        return x.view(np.uint16)
    return x.view(np.uint8) if x.dtype == np.bool_ else x


@functools.cache
def check_dtype(dtype: np.dtype[Any], op: str | None = None) -> None:
    """Raise `ValueError` unless this type can be moved, or reduced with `op` if one is given."""
    if dtype.name not in DTYPES or not dtype.isnative:
        raise ValueError(
            f"dtype {dtype.name if dtype.isnative else dtype.str} cannot be communicated: "
            f"convert to one of {', '.join(DTYPES)}"
        )
    if op is None:
        return
    if op not in OPS:
        raise ValueError(f"op={op!r} is not one of {', '.join(OPS)}")
    if dtype == np.bool_:
        raise ValueError(f"bool has no {op}: reduce x.view('uint8') (min is 'all', max is 'any')")


@dataclass(slots=True)
class Operands:
    """Input and output of one collective call: checked, contiguous, both on one device."""

    source: Array
    """What this rank contributes; the same object as `target` for an operation in place."""
    target: Array | None
    """Where the result goes; None on ranks that get none."""
    result: Any
    """What the caller gets, once `finish` has completed it."""
    copy_to: Array | None = None
    """Where `target` is copied in the end, if it stands in for a part of the input."""

    def flat(self) -> tuple[Array, Array]:
        """Input and result in one dimension; the same object for an operation in place."""
        assert self.target is not None, "every rank gets a result here"
        target = self.target if self.target.ndim == 1 else self.target.reshape(-1)
        return (target if self.source is self.target else self.source.reshape(-1)), target

    def finish(self) -> Any:
        """Deliver the result: returns what the caller gets."""
        if self.copy_to is not None:
            self.copy_to[...] = self.target
        return self.result


def operands(
    x: Any,
    out: Any,
    shape: Callable[[Shape], Shape],
    op: str | None = None,
    *,
    receives: bool = True,
    home: Callable[[Shape], int] | None = None,
    keep_source: bool = False,
) -> Operands:
    """Check the input and the output of a collective call, and make them fit.

    `shape` maps the shape of the input to that of the result, and may refuse it. A non-contiguous
    input is copied, and so is one that overlaps `out`, unless the two coincide or one is the block
    of the other that begins at row `home`. A non-contiguous `out` is refused. `receives=False` on
    ranks that get no result, where `out` is ignored. `keep_source`: where input and `out` overlap,
    the result is copied instead of the input, which may lie in memory that ranks share.
    """
    given = x if type(x) is np.ndarray else as_array(x)
    source = contiguous(given)
    check_dtype(source.dtype, op)
    expected = shape(source.shape)
    if not receives:
        return Operands(source, None, None)
    if out is None:
        device = "cuda" if on_device(source) else "cpu"
        fresh = memory.empty(expected, source.dtype, device=device)
        return Operands(source, fresh, fresh)
    if out is x and not isinstance(x, np.generic):
        target = given
    else:
        target = out if type(out) is np.ndarray else as_array(out, read=False)
    check_out(target, expected, source.dtype)
    if type(source) is not type(target) and on_device(source) != on_device(target):
        raise ValueError(f"x is {_place(source)}, but out is {_place(target)}: pass both on one")
    if source is not target and source.size and _overlap(source, target):
        apart = _disentangled(source, target, home(source.shape) if home else None)
        if keep_source and apart is not source and apart is not target:
            return Operands(source, _copy(target), out, copy_to=target)
        source = apart
    return Operands(source, target, out)


def _overlap(source: Array, target: Array) -> bool:
    module = xp(source) if on_device(source) else np
    return bool(module.may_share_memory(source, target))


def _place(x: Array) -> str:
    return "on a GPU" if on_device(x) else "on the host"


def contiguous(x: Array) -> Array:
    """The array itself if it is C-contiguous and aligned, else a copy that is."""
    if type(x) is np.ndarray and x.flags.carray:
        return x
    return x if x.flags.c_contiguous and (on_device(x) or x.flags.aligned) else _copy(x)


def _copy(x: Array) -> Array:
    made = room(x, x.size).reshape(x.shape)
    made[...] = x
    return made


def check_out(out: Array, shape: Shape, dtype: np.dtype[Any]) -> None:
    """Raise `ValueError` unless a result of this shape and type can be written to `out`."""
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, but the result has {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype.name}, but the input has {dtype.name}")
    if type(out) is np.ndarray and out.flags.carray:
        return
    if not out.flags.c_contiguous:
        raise ValueError(
            f"out of shape {out.shape} and strides {out.strides} is not C-contiguous: "
            "receive into a contiguous array, then assign"
        )
    if on_device(out):  # which has no other flags
        return
    if not out.flags.aligned:
        raise ValueError(f"out of shape {out.shape} begins within an element: pass another array")
    if not out.flags.writeable:
        raise ValueError(f"out of shape {out.shape} is read-only: pass a writable array or None")


def _disentangled(source: Array, target: Array, home: int | None) -> Array:
    """The source as `target` itself if they coincide, as it is at its home, or else as a copy."""
    offset = _address(source) - _address(target)
    if offset == 0 and source.nbytes == target.nbytes:
        return target
    row = source.itemsize * math.prod(source.shape[1:])
    # The smaller of the two is the block, and where it begins must be after the other's start.
    into = offset if source.nbytes <= target.nbytes else -offset
    return source if home is not None and into == home * row else _copy(source)


def _address(x: Array) -> int:
    array: Any = x
    return int(array.data.ptr if on_device(x) else x.__array_interface__["data"][0])


def blocks_of(
    what: str, size: int, counts: Sequence[int] | None = None, rank: int = 0
) -> Callable[[Shape], Shape]:
    """Shape rule: dim 0 is cut into `size` blocks, and the result is one of them.

    Equal ones, or of `counts` rows; then the result is that of `rank`.
    """
    check_counts(what, size, counts)

    def rule(shape: Shape) -> Shape:
        if not shape:
            raise ValueError(f"{what} cuts dim 0, but the input has no dims: use reshape(-1)")
        if counts is not None:
            if shape[0] != sum(counts):
                raise ValueError(
                    f"{what} with counts={list(counts)} cuts {sum(counts)} rows, "
                    f"but the input has shape {shape}"
                )
            return (counts[rank], *shape[1:])
        if shape[0] % size:
            padded = -(-shape[0] // size) * size
            raise ValueError(
                f"{what} over {size} ranks cannot cut dim 0 of shape {shape} into equal blocks: "
                f"pad it from {shape[0]} to {padded}"
            )
        return (shape[0] // size, *shape[1:])

    return rule


def stacked(
    what: str, size: int, counts: Sequence[int] | None = None, rank: int = 0
) -> Callable[[Shape], Shape]:
    """Shape rule: the result holds `size` blocks of the input's shape along dim 0.

    Or blocks of `counts` rows, of which the input is that of `rank`.
    """
    check_counts(what, size, counts)

    def rule(shape: Shape) -> Shape:
        if not shape:
            raise ValueError(f"{what} joins along dim 0, but the input has no dims: use reshape(1)")
        if counts is not None:
            if shape[0] != counts[rank]:
                raise ValueError(
                    f"{what} with counts={list(counts)} takes {counts[rank]} rows of rank {rank}, "
                    f"but the input has shape {shape}"
                )
            return (sum(counts), *shape[1:])
        return (shape[0] * size, *shape[1:])

    return rule


def check_counts(what: str, size: int, counts: Sequence[int] | None) -> None:
    """Raise `ValueError` unless these are rows for each of `size` ranks."""
    if counts is not None and (len(counts) != size or min(counts) < 0):
        raise ValueError(
            f"{what} over {size} ranks needs as many counts of 0 or more, not {list(counts)}"
        )


def elements(shape: Shape, size: int, counts: Sequence[int] | None) -> tuple[int, ...]:
    """Elements of each rank's block of an array of this shape, cut along dim 0."""
    row = math.prod(shape[1:])
    if counts is None:
        return (shape[0] // size * row,) * size
    return tuple(count * row for count in counts)


def unchanged(shape: Shape) -> Shape:
    """Shape rule: the result has the shape of the input."""
    return shape
