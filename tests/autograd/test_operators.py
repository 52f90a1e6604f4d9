"""Operators and methods of tensors against PyTorch: values, types, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Tensor, from_dlpack
from hpcml.autograd.ops import linear, shape
from tests.autograd.support import Array, layouts, normal, same_as_torch

torch = pytest.importorskip("torch")
DTYPES = ["float32", "float64"]
SHAPES: list[tuple[int, ...]] = [(3, 4), (), (1,), (0, 4), (2, 3, 4)]
PAIRS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((), (3, 4)), ((2, 3), ()), ((), ()),
         ((4, 1, 3), (2, 1)), ((0, 3), (3,)), ((1,), (1, 1)), ((2, 0), (2, 1))]  # fmt: skip

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "pow": lambda a, b: (a.abs() + 0.1) ** b,
    "both": lambda a, b: a * b + a / 2 - b * a,
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: -x,
    "abs": abs,
    "exp": lambda x: x.exp(),
    "log": lambda x: (x.abs() + 0.1).log(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: (x * 30).sigmoid(),
    "relu": lambda x: x.relu(),
    "numbers": lambda x: 2 - (1 + x * 3) / 4 + 5 * x - 1,
    "reversed": lambda x: 1 / (x.abs() + 1) + 2.0**x,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "power 0": lambda x: x**0,
    "clamp": lambda x: x.clamp(-0.5, 0.4),
    "clamp min": lambda x: x.clamp(min=0.1),
    "clamp max": lambda x: x.clamp(max=0.1),
    "float": lambda x: x.float() * 2,
    "double": lambda x: x.double() * 2,
    "reshape": lambda x: x.reshape(-1, 1) if x.shape != (0, 4) else x.reshape(4, 0),
    "flatten": lambda x: x.flatten(),
    "flatten from 1": lambda x: x.flatten(1) if x.ndim > 1 else x * 1,
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda x: x.unsqueeze(0).squeeze() * 2,
    "squeeze dim": lambda x: x.unsqueeze(-1).squeeze(-1).unsqueeze(0).squeeze(-1) * 2,
    "expand": lambda x: x.expand(2, *x.shape),
    "expand keeps": lambda x: x.unsqueeze(0).expand(3, *[-1] * x.ndim),
    "view": lambda x: x.view(*x.shape, 1),
    "item 0": lambda x: x[0] if x.ndim and x.shape[0] else x * 1,
    "ellipsis": lambda x: x[..., None],
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "softmax": lambda x: x.unsqueeze(0).softmax(-1),
    "log_softmax": lambda x: x.unsqueeze(0).log_softmax(0),
}
MATRIX: dict[str, Callable[[Any], Any]] = {
    "sum 0": lambda x: x.sum(0),
    "sum keepdim": lambda x: x.sum((0, -1), keepdim=True),
    "mean 1": lambda x: x.mean(1),
    "mean list": lambda x: x.mean([0, 1], keepdim=True),
    "amax": lambda x: x.amax(1),
    "amax all": lambda x: x.amax((0, 1, 2)),
    "var": lambda x: x.var(),
    "var dim": lambda x: x.var(1, keepdim=True),
    "var biased": lambda x: x.var((0, 2), correction=0),
    "permute": lambda x: x.permute(2, 0, 1) * 2,
    "permute tuple": lambda x: x.permute((-1, 0, 1)) * 2,
    "transpose": lambda x: x.transpose(0, -1) * 2,
    "T": lambda x: x[0].T * 2,
    "flatten middle": lambda x: x.flatten(0, 1),
    "flatten a permutation": lambda x: x.permute(2, 0, 1).flatten(1),
    "slices": lambda x: x[1:, ::2, -1],
    "new axis": lambda x: x[:, None, 1:3],
    "integers": lambda x: x[1, -1],
    "list": lambda x: x[[0, 1, 1]],
    "split": lambda x: sum(p.sum() * (i + 1) for i, p in enumerate(x.split(3, 1))),
    "split sizes": lambda x: sum(p.sum() * (i + 1) for i, p in enumerate(x.split([1, 0, 4], -2))),
    "chunk": lambda x: sum(p.sum() * (i + 1) for i, p in enumerate(x.chunk(3, 1))),
    "softmax 1": lambda x: x.softmax(1),
    "log_softmax 0": lambda x: x.log_softmax(0),
    "matrix with itself": lambda x: x @ x.transpose(-1, -2),
    "attention": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, dtype: str) -> None:
    for a, b in PAIRS:
        x, y = normal(*a, dtype=dtype), normal(*b, dtype=dtype, salt=2)
        for kind in layouts(x):
            same_as_torch(BINARY[name], BINARY[name], layouts(x)[kind], layouts(y)[kind])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, dtype: str) -> None:
    for size in SHAPES:
        x = normal(*size, dtype=dtype)
        for copy in layouts(x).values():
            same_as_torch(UNARY[name], UNARY[name], copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATRIX)
def test_of_three_dimensions(name: str, dtype: str) -> None:
    for copy in layouts(normal(2, 5, 4, dtype=dtype)).values():
        same_as_torch(MATRIX[name], MATRIX[name], copy, factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [((2, 3), (3, 4)), ((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((5, 2, 3), (3, 4)),
     ((5, 1, 2, 3), (4, 3, 2)), ((3,), (5, 3, 4)), ((0, 3), (3, 4)), ((2, 0), (0, 4)),
     ((0, 2, 3), (3, 1)), ((70, 65), (65, 80))],
    ids=str,
)  # fmt: skip
def test_matmul(sizes: tuple[tuple[int, ...], ...], dtype: str) -> None:
    a, b = (normal(*s, dtype=dtype, salt=i) for i, s in enumerate(sizes))
    for kind in layouts(a):
        same_as_torch(lambda x, y: x @ y, lambda x, y: x @ y, layouts(a)[kind], layouts(b)[kind])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_fill(dtype: str) -> None:
    x, mask = normal(3, 4, dtype=dtype), normal(3, 4) > 0
    for m in (mask, mask[0], mask[:, :1], np.zeros((3, 4), bool)):
        same_as_torch(
            lambda x, m=m: x.masked_fill(m, -2.0) * x,
            lambda x, m=m: x.masked_fill(torch.tensor(m), -2.0) * x,
            x,
        )
    filled = Tensor(x).masked_fill(Tensor(mask), np.float64("-inf"))
    assert filled.dtype == dtype and np.isneginf(filled.numpy()[mask]).all()


def test_indexing_by_tensors() -> None:
    x = normal(4, 3)
    for index in (np.array([3, 3, 0]), np.array(2), np.array([], np.int64), x > 0):
        ours, theirs = Tensor(index), torch.tensor(index)
        same_as_torch(lambda x, i=ours: x[i] * 2, lambda x, i=theirs: x[i] * 2, x)
    rows, columns = np.array([0, 1, 1]), np.array([2, 0, 0])
    same_as_torch(
        lambda x: x[Tensor(rows), columns],
        lambda x: x[torch.tensor(rows), torch.tensor(columns)],
        x,
    )
    assert Tensor(x)[np.int64(1)].shape == (3,)


def test_cat() -> None:
    for parts, dim in [([(2, 3), (2, 3)], 0), ([(2, 3), (2, 0), (2, 1)], -1), ([(1,)], 0)]:
        arrays = [normal(*s, salt=i) for i, s in enumerate(parts)]
        same_as_torch(
            lambda *x, d=dim: shape.cat(list(x), d) * 2,
            lambda *x, d=dim: torch.cat(x, d) * 2,
            *arrays,
        )


def test_pieces_of_nothing() -> None:
    empty, peer = Tensor(np.empty((0, 2), np.float32)), torch.empty(0, 2)
    for cut in (lambda x: x.split(3), lambda x: x.chunk(3), lambda x: x.split([0, 0])):
        assert [p.shape for p in cut(empty)] == [tuple(p.shape) for p in cut(peer)]
    assert [p.shape for p in Tensor(normal(7)).chunk(3)] == [(3,), (3,), (1,)]


def test_integers_become_float32_as_in_torch() -> None:
    i, peer = Tensor(np.arange(1, 4)), torch.arange(1, 4)
    for f in (lambda x: x / 2, lambda x: x * 0.5, lambda x: x.exp(), lambda x: x.sqrt(),
              lambda x: 1 / x, lambda x: x.sigmoid(), lambda x: x.tanh(), lambda x: x + 1,
              lambda x: x // x if isinstance(x, int) else x * x, lambda x: -x):  # fmt: skip
        out, expected = f(i), f(peer)
        assert f"torch.{out.dtype}" == str(expected.dtype)
        np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-6)


def test_mixed_floats_promote_and_gradients_keep_each_type() -> None:
    def mixed(a: Any, b: Any) -> Any:
        return (a * b + a - b / 2) ** 2

    a, b = normal(2, 3, dtype="float32"), normal(3, salt=1)
    x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    out = mixed(x.tanh(), y.tanh())
    assert out.dtype == np.float64
    out.sum().backward()
    assert x.gradient is not None and x.gradient.dtype == np.float32
    assert y.gradient is not None and y.gradient.dtype == np.float64
    p, q = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    mixed(p.tanh(), q.tanh()).sum().backward()
    np.testing.assert_allclose(x.gradient, p.grad.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y.gradient, q.grad.numpy(), rtol=1e-6, atol=1e-6)


def test_comparisons_and_argmax() -> None:
    x, y = normal(3, 4), normal(4, salt=1)
    for other in (y, 0.0, np.float64(0.1), np.float32(0)):
        for f in (lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b, lambda a, b: a >= b,
                  lambda a, b: a == b, lambda a, b: a != b):  # fmt: skip
            ours = f(Tensor(x), other)
            assert isinstance(ours, Tensor) and ours.dtype == bool
            np.testing.assert_array_equal(ours.numpy(), f(x, other))
    assert isinstance(y < Tensor(x), Tensor)
    for keep in (True, False):
        for dim in (None, 0, -1):
            expected = torch.tensor(x).argmax(dim, keepdim=keep)
            np.testing.assert_array_equal(Tensor(x).argmax(dim, keepdim=keep).numpy(), expected)


def test_clamp_of_nan_and_at_the_bounds() -> None:
    with np.errstate(invalid="ignore"):
        same_as_torch(
            lambda x: x.clamp(-1, 1), lambda x: x.clamp(-1, 1), np.array([np.nan, -1, 1, 2, np.inf])
        )


def test_power_at_zero() -> None:
    a, b = np.array([0.0, 0, 0, 2]), np.array([0.0, 1, 2.5, 0])
    same_as_torch(lambda x, y: x**y, lambda x, y: x**y, a, b)
    for exponent in (0, 1, 2, 3.5):
        same_as_torch(lambda x, e=exponent: x**e, lambda x, e=exponent: x**e, np.zeros(3))


def test_mean_of_nothing_is_nan() -> None:
    same_as_torch(lambda x: x.mean(), lambda x: x.mean(), np.empty((0, 3)))
    same_as_torch(lambda x: x.mean(0), lambda x: x.mean(0), np.empty((0, 3), np.float32))


def test_exchange_through_dlpack_and_numpy() -> None:
    x = normal(2, 3, dtype="float32")
    tensor = Tensor(x)
    assert np.shares_memory(np.from_dlpack(tensor), x)
    there = torch.from_dlpack(tensor)
    there[0, 0] = 7
    assert x[0, 0] == 7  # one memory
    back = from_dlpack(there)
    assert isinstance(back, Tensor) and np.shares_memory(back.data, x)
    assert from_dlpack(tensor).data.tolist() == from_dlpack(x).tolist() == x.tolist()
    assert np.shares_memory(np.asarray(tensor), x)
    assert np.asarray(tensor, np.float64).dtype == np.float64
    assert Tensor(torch.ones(2, dtype=torch.float64)).dtype == np.float64


def check_results_are_arrays(x: Array) -> None:
    tensor = Tensor(x, requires_grad=True)
    for f in (*UNARY.values(), lambda x: x * 2, lambda x: x @ x if x.ndim else x + 1):
        out = f(tensor)
        assert type(out.data) is np.ndarray
        tensor.grad = None
        out.backward(np.ones(out.shape))
        assert type(tensor.gradient) is np.ndarray


def test_no_numpy_scalars_leak() -> None:
    check_results_are_arrays(normal())
    check_results_are_arrays(normal(1))


@pytest.mark.parametrize("other", ["float64", "float16"])
def test_products_of_two_types_are_an_error(other: str) -> None:
    a, b = Tensor(np.ones((2, 2), np.float32)), Tensor(np.ones((2, 2), other))
    for mix in (lambda: a @ b, lambda: b @ a, lambda: linear.linear(a, b, None), lambda: a @ b[0]):
        with pytest.raises(TypeError, match="convert them to one type"):
            mix()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8"])
def test_products_of_integers_are_those_of_numpy(dtype: str) -> None:
    a, b = np.arange(6, dtype=dtype).reshape(2, 3), np.arange(12, dtype=dtype).reshape(4, 3)
    np.testing.assert_array_equal(linear.linear(Tensor(a), Tensor(b), None).data, a @ b.T)
    np.testing.assert_array_equal((Tensor(a) @ Tensor(b.T)).data, a @ b.T)
