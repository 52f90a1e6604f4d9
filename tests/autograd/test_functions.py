"""Functions of several tensors, and extremes, against PyTorch: values, types, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import autograd, backend
from hpcml.autograd import Tensor, gradcheck
from tests.autograd.support import layouts, leaf, normal, same_as_torch

torch = pytest.importorskip("torch")
NAMES = ["cat", "stack", "where", "maximum", "minimum"]
NAN = float("nan")


def same(function: Any, *arrays: Any) -> None:
    """`function(library, *tensors)` is the same with hpcml and with torch as the library."""
    same_as_torch(lambda *x: function(hpcml, *x), lambda *x: function(torch, *x), *arrays)


@pytest.mark.parametrize("name", NAMES)
def test_the_package_has_them(name: str) -> None:
    assert getattr(hpcml, name) is getattr(autograd, name)
    assert name in hpcml.__all__ and name in autograd.__all__


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_and_stack(dim: int, dtype: str) -> None:
    x, y = normal(2, 3, dtype=dtype), normal(2, 3, dtype=dtype, salt=1)
    for kind in layouts(x):
        parts = [layouts(x)[kind], layouts(y)[kind]]
        same(lambda lib, *a: lib.cat(a, dim) * 2, *parts)
        same(lambda lib, *a: lib.cat(list(a), dim=dim) * 2, *parts)
        same(lambda lib, *a: lib.stack(a, dim) * 2, *parts)
    same(lambda lib, a: lib.stack([a, a]) * lib.cat([a, a]).reshape(2, 2, 3), x)
    same(lambda lib, *a: lib.stack(a), normal(), normal(salt=1))


def test_cat_and_stack_of_what_does_not_fit() -> None:
    for function in (hpcml.cat, hpcml.stack):
        with pytest.raises(ValueError, match=r"give at least one tensor"):
            function([])
        with pytest.raises(ValueError, match=r"^cat\("):
            function([Tensor(normal(2, 3)), Tensor(normal(2, 4))])


def test_where() -> None:
    condition = normal(3, 4, salt=5) > 0
    for a, b in [((3, 4), (3, 4)), ((4,), (3, 1)), ((), (3, 4))]:
        x, y = normal(*a), normal(*b, salt=1)
        same(lambda lib, c, x, y: lib.where(c, x, y) * 2, condition, x, y)
        same(lambda lib, c, x: lib.where(c, x, 1.5) * 2, condition, x)
        same(lambda lib, c, x: lib.where(x > 0, 0, x) * 2, condition, x)
    hidden = np.array([NAN, 2])  # what was not chosen leaves no trace
    same(lambda lib, x: lib.where(x == x, x, 0.0), hidden)


def test_types_of_where_are_those_of_torch() -> None:
    i, f, d = np.arange(3), normal(3, dtype="float32"), normal(3)
    c = i > 0
    for a, b in [(i, f), (f, d), (i, 0.5), (f, 2), (1.0, 0.5), (1, 0), (i, 2)]:
        ours = hpcml.where(c, *(Tensor(x) if isinstance(x, np.ndarray) else x for x in (a, b)))
        theirs = torch.where(
            torch.tensor(c), *(torch.tensor(x) if isinstance(x, np.ndarray) else x for x in (a, b))
        )
        assert f"torch.{ours.dtype}" == str(theirs.dtype)
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_sixteen_bits_stay_sixteen_bits(name: str) -> None:
    x = leaf(normal(3, 4).astype(backend.dtype(name)))
    for out in (hpcml.where(x > 0, x, 0.5), x.masked_fill(x > 0, -np.inf), x.clamp(max=0.5),
                hpcml.maximum(x, 0.5), hpcml.minimum(x, x), hpcml.stack([x, x]), x.std(0),
                x.amax(0), x.relu()):  # fmt: skip
        x.grad = None
        out.backward(np.ones(out.shape))
        assert out.dtype == x.dtype and x.grad is not None and x.grad.dtype == x.dtype


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_larger_and_smaller(name: str) -> None:
    for a, b in [((3, 4), (3, 4)), ((4,), (3, 1)), ((), (3, 4)), ((0, 3), (3,))]:
        same(lambda lib, x, y: getattr(lib, name)(x, y), normal(*a), normal(*b, salt=1))
    ties = np.array([1.0, 2, 2, NAN, 1, NAN, np.inf]), np.array([1.0, 3, 1, 1, NAN, NAN, np.inf])
    same(lambda lib, x, y: getattr(lib, name)(x, y), *ties)
    small = np.array([0, 5, 255], np.uint8), np.array([3, 5, 0], np.uint8)
    found = getattr(hpcml, name)(*map(Tensor, small))
    assert found.dtype == np.uint8
    assert found.tolist() == getattr(torch, name)(*map(torch.tensor, small)).tolist()
    x = leaf(np.array([1.0, 3]))
    getattr(hpcml, name)(x, 2).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [name == "minimum", name == "maximum"]


@pytest.mark.parametrize("name", ["amax", "amin", "max", "min"])
def test_extremes_of_all_elements_share_the_gradient(name: str) -> None:
    for x in (normal(3, 4), np.array([[2.0, 1, 2], [1, 2, 1]]), normal()):
        same_as_torch(lambda x: getattr(x, name)() * 2, lambda x: getattr(x, name)() * 2, x)
    assert getattr(Tensor(np.array([3, 200], np.uint8)), name)().item() == (
        200 if name.endswith("max") else 3
    )


@pytest.mark.parametrize("dim", [0, -1, (0, 2), [1]])
def test_amin_over_dimensions(dim: Any) -> None:
    for keep in (True, False):
        same(lambda lib, x, k=keep: x.amin(dim, k) * 2, normal(2, 3, 4).round(1))


def test_std() -> None:
    x = normal(2, 5, 4)
    same(lambda lib, x: x.std(), x)
    for options in ({"correction": 0}, {"keepdim": True}, {}):
        same(lambda lib, x, o=options: x.std(1, **o), x)
    assert gradcheck(lambda x: x.std((0, 2)), [leaf(x)])
    x[0, :, 1] = 3  # no spread: the slope of the root is infinite there
    same(lambda lib, x: x.std(1), x)


@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin"])
def test_no_dimensions_are_all(name: str) -> None:
    for keep in (True, False):
        same(lambda lib, x, k=keep: getattr(x, name)((), keepdim=k) * 2, normal(2, 3))
    assert getattr(Tensor(normal(2, 3)), name)([]).shape == ()


def test_relu_passes_the_gradient_at_nan() -> None:
    x, g = np.array([NAN, -1, 0, 2, NAN]), np.array([1.0, 2, 3, 4, NAN])
    ours, theirs = leaf(x), torch.tensor(x, requires_grad=True)
    ours.relu().backward(g)
    theirs.relu().backward(torch.tensor(g))
    np.testing.assert_array_equal(ours.gradient, theirs.grad.numpy())  # type: ignore[arg-type]
