"""What the tests of autograd and nn share: awkward random arrays, comparison with PyTorch."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Context, Tensor, primitive

Array = np.ndarray[Any, Any]

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}  # of the largest element


def normal(*shape: int, dtype: str = "float64", salt: int = 0) -> Array:
    """Standard normal numbers, the same on every run."""
    generator = np.random.default_rng(zlib.crc32(repr((shape, salt)).encode()))
    return np.asarray(generator.standard_normal(shape)).astype(dtype)


def layouts(x: Array) -> dict[str, Array]:
    """Arrays equal to x whose elements lie otherwise."""
    x = np.asarray(x)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]) if x.ndim else (), x.dtype)
    strided = wide[..., ::2] if x.ndim else wide
    strided[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "plain": x.copy(),
        "transposed": x.T.copy().T,
        "strided": strided,
        "reversed": x[..., ::-1].copy()[..., ::-1] if x.ndim else x.copy(),
        "frozen": frozen,
    }


def leaf(x: Array) -> Tensor:
    """A tensor that wants a gradient."""
    return Tensor(x, requires_grad=True)


def assert_close(actual: Any, expected: Any, dtype: str = "float64", factor: float = 1) -> None:
    """Equal shapes, and differences within the tolerance of the type times `factor`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    largest = np.abs(expected).max(initial=1, where=np.isfinite(expected))
    limit = factor * TOLERANCE[dtype] * largest
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def same_as_torch(
    ours: Callable[..., Tensor], theirs: Callable[..., Any], *arrays: Array, factor: float = 1
) -> None:
    """Compare value, type and the gradients of all float inputs, for a random output gradient."""
    torch = pytest.importorskip("torch")
    mine = [leaf(a) if a.dtype.kind == "f" else Tensor(a) for a in arrays]
    peers = [torch.tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in arrays]
    out, expected = ours(*mine), theirs(*peers)
    dtype = str(out.dtype)
    assert type(out.data) is np.ndarray
    assert dtype == str(expected.dtype).removeprefix("torch.")
    assert_close(out.numpy(), expected.detach().numpy(), dtype, factor)
    g = normal(*out.shape, dtype=dtype, salt=1)
    out.backward(g)
    expected.backward(torch.tensor(g))
    for a, b in zip(mine, peers, strict=True):
        if b.requires_grad:
            assert a.grad is not None
            assert type(a.grad.data) is np.ndarray and a.grad.dtype == a.dtype
            assert_close(a.grad.numpy(), b.grad.numpy(), str(a.dtype), factor)


def noting(name: str, calls: list[str]) -> Any:
    """An operation that notes when its adjoints run."""

    @primitive
    def noted(ctx: Context, a: Array, b: Array) -> Array:
        return a + b

    for which in "ab":
        noted.adjoint(lambda ctx, g, which=which: calls.append(name + which) or ctx.fit(g, 0))
    return noted
