"""The three matrix products of a linear layer, straight into given memory."""

from __future__ import annotations

from typing import Any

from hpcml.kernels.cpu.blas import PLAIN, TRANSPOSED, gemm
from hpcml.kernels.cpu.jit import kernel


@kernel("void(R[:, ::1], R[:, ::1], T[:, ::1])")
def linear(x: Any, weight: Any, out: Any) -> None:
    """out = x weight^T: x (rows, in), weight (out, in), out (rows, out)."""
    (rows, n), m = x.shape, weight.shape[0]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or m == 0:  # BLAS refuses leading dimensions of 0
        out[:, :] = zero
        return
    gemm(PLAIN, TRANSPOSED, rows, m, n, one, x.ctypes.data, n, weight.ctypes.data, n, zero,
         out.ctypes.data, m)  # fmt: skip


@kernel("void(R[:, ::1], R[:, ::1], T[:, ::1])")
def linear_input_gradient(g: Any, weight: Any, out: Any) -> None:
    """out = g weight: g (rows, out), weight (out, in), out (rows, in)."""
    (rows, m), n = g.shape, weight.shape[1]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or m == 0:
        out[:, :] = zero
        return
    gemm(PLAIN, PLAIN, rows, n, m, one, g.ctypes.data, m, weight.ctypes.data, n, zero,
         out.ctypes.data, n)  # fmt: skip


@kernel("void(R[:, ::1], R[:, ::1], T[:, ::1])")
def linear_weight_gradient(g: Any, x: Any, out: Any) -> None:
    """out = g^T x: g (rows, out), x (rows, in), out (out, in)."""
    (rows, m), n = g.shape, x.shape[1]
    one, zero = out.dtype.type(1), out.dtype.type(0)
    if rows == 0 or n == 0 or m == 0:
        out[:, :] = zero
        return
    gemm(TRANSPOSED, PLAIN, m, n, rows, one, g.ctypes.data, m, x.ctypes.data, n, zero,
         out.ctypes.data, n)  # fmt: skip
