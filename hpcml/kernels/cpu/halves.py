"""16-bit floats as uint16 words: numba has no such types. Arithmetic is in float32.

`brain` tells bfloat16 from float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcml.kernels.cpu.functions import _as_float32, _as_int32
from hpcml.kernels.cpu.jit import inline, kernel
from hpcml.kernels.cpu.team import divided, elements

_HIGH, _HALF, _ODD = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_NAN = np.uint32(0x7FC0)


@intrinsic
def from_float16(typingctx: Any, bits: Any) -> Any:
    """The float32 of a float16's bits, exactly."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def to_float16(typingctx: Any, number: Any) -> Any:
    """The bits of the nearest float16, of two the even one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@inline
def from_bfloat16(bits: Any) -> Any:
    """The float32 of a bfloat16's bits, exactly."""
    return _as_float32(np.int32(np.uint32(bits) << _HIGH))


@inline
def to_bfloat16(number: Any) -> Any:
    """The bits of the nearest bfloat16, of two the even one; NaN stays NaN."""
    bits = np.uint32(_as_int32(number))
    rounded = (bits + _HALF + ((bits >> _HIGH) & _ODD)) >> _HIGH
    return np.uint16(_NAN if number != number else rounded)


@inline
def widen_all(x: Any, out: Any, brain: bool) -> None:
    """Store the numbers `x` in float32."""
    if brain:
        for i in range(x.size):
            out[i] = from_bfloat16(x[i])
    else:
        for i in range(x.size):
            out[i] = from_float16(x[i])


@inline
def narrow_all(x: Any, out: Any, brain: bool) -> None:
    """Round float32 numbers to 16 bits, to nearest, of two the even one."""
    if brain:
        for i in range(out.size):
            out[i] = to_bfloat16(x[i])
    else:
        for i in range(out.size):
            out[i] = to_float16(x[i])


@divided("void(H[::1], float32[::1], boolean)", elements)
def widen(x: Any, out: Any, brain: bool, low: int, high: int) -> None:
    """Store the numbers `x` in float32."""
    widen_all(x[low:high], out[low:high], brain)


@divided("void(float32[::1], uint16[::1], boolean)", elements)
def narrow(x: Any, out: Any, brain: bool, low: int, high: int) -> None:
    """Round float32 numbers to 16 bits, to nearest, of two the even one."""
    narrow_all(x[low:high], out[low:high], brain)


@kernel("void(H[::1], float32[::1], boolean)")
def widen_add(x: Any, total: Any, brain: bool) -> None:
    """Add the numbers `x` to float32 numbers."""
    if brain:
        for i in range(x.size):
            total[i] += from_bfloat16(x[i])
    else:
        for i in range(x.size):
            total[i] += from_float16(x[i])


@kernel("void(float32[::1], int64, boolean)")
def round_to_half(x: Any, count: int, brain: bool) -> None:
    """Round the first `count` float32 numbers to values that 16 bits can hold, in place."""
    if brain:
        for i in range(count):
            x[i] = from_bfloat16(to_bfloat16(x[i]))
    else:
        for i in range(count):
            x[i] = from_float16(to_float16(x[i]))
