"""Every primitive against finite differences in float64."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Primitive, Tensor, gradcheck, ops, primitive
from hpcml.autograd.ops import shape
from tests.autograd.cases import TABLE
from tests.autograd.support import Array, layouts, leaf, normal


def test_all_primitives_are_in_the_table() -> None:
    found = {}
    names = [f"{ops.__name__}.{m.name}" for m in pkgutil.iter_modules(ops.__path__)]
    for name in [*names, "hpcml.nn.module"]:
        for key, value in vars(importlib.import_module(name)).items():
            if isinstance(value, Primitive):
                found[value] = f"{name}.{key}"
    assert len(found) > 30
    assert not [name for value, name in found.items() if not TABLE.get(value)]


@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_adjoints(operation: Primitive) -> None:
    for function, arrays in TABLE[operation]:
        assert gradcheck(function, [leaf(a) for a in arrays])


@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_layouts_change_nothing(operation: Primitive) -> None:
    """Transposed, strided, reversed or read-only inputs: the values and gradients of plain ones."""
    for function, arrays in TABLE[operation]:
        results = []
        for kind in layouts(arrays[0]):
            inputs = [leaf(layouts(a)[kind]) for a in arrays]
            out = function(*inputs)
            out.backward(layouts(normal(*out.shape, salt=7))[kind])
            results.append([out.numpy(), *[x.gradient for x in inputs]])
        for others in results[1:]:
            for a, b in zip(results[0], others, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_expanded_inputs(operation: Primitive) -> None:
    """An input that repeats one sample without a copy, as `expand` makes it."""
    for function, arrays in TABLE[operation]:
        if not arrays[0].ndim or not arrays[0].size:
            continue
        expanded = np.broadcast_to(arrays[0][:1], arrays[0].shape)
        values = [
            function(Tensor(x), *map(Tensor, arrays[1:])) for x in (expanded, expanded.copy())
        ]
        np.testing.assert_allclose(values[0].numpy(), values[1].numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_cat(count: int) -> None:
    parts = [normal(2, n, salt=n) for n in [3, 0, 1, 2][:count]]
    assert gradcheck(lambda *x: shape.cat(list(x), dim=-1), [leaf(p) for p in parts])
    assert gradcheck(lambda *x: shape.cat([y.T for y in x]), [leaf(p) for p in parts])


def test_gradcheck_finds_a_wrong_adjoint() -> None:
    @primitive
    def wrong(ctx: Any, a: Array, b: Array) -> Array:
        ctx.save(a, b)
        return a * b

    @wrong.adjoint
    def wrong_a(ctx: Any, g: Array) -> Array:
        return g * ctx.saved[1]

    @wrong.adjoint
    def wrong_b(ctx: Any, g: Array) -> Array:
        return g * ctx.saved[0] * 1.001

    with pytest.raises(AssertionError, match="input 1 of shape"):
        gradcheck(wrong, [leaf(normal(3)), leaf(normal(3, salt=1))])
    with pytest.raises(TypeError, match="input 0 is float32"):
        gradcheck(wrong, [leaf(normal(3, dtype="float32"))])


def test_gradcheck_finds_a_missing_term() -> None:
    x = leaf(normal(3))
    constant = x.detach()
    with pytest.raises(AssertionError, match="gradcheck: input 0"):
        gradcheck(lambda x: x * Tensor(x.data) + constant, [x])
