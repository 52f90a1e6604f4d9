"""Operators that users write."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.autograd import Context, Tensor, contributions, primitive
from hpcml.autograd.ops import pointwise
from tests.autograd.support import Array, leaf, normal, noting


def test_primitives_of_the_user() -> None:
    """The example of the module, with a target that gets no gradient and an attribute."""

    @primitive
    def weighted(ctx: Context, a: Array, b: Array, index: Array, *, power: int) -> Array:
        """(a * b) ** power, chosen."""
        ctx.save(a, b)
        ctx.attributes = index, power
        return ((a * b) ** power)[index]

    @weighted.adjoint
    def weighted_a(ctx: Context, g: Array) -> Array:
        _, b = ctx.saved
        return ctx.fit(spread(ctx, g) * b, 0)

    @weighted.adjoint
    def weighted_b(ctx: Context, g: Array) -> Array:
        a, _ = ctx.saved
        return ctx.fit(spread(ctx, g) * a, 1)

    def spread(ctx: Context, g: Array) -> Any:
        index, power = ctx.attributes

        def compute() -> Array:
            a, b = ctx.saved
            full = np.zeros(np.broadcast_shapes(a.shape, b.shape))
            full[index] = g
            return full * power * (a * b) ** (power - 1)

        calls.append(1)
        return ctx.shared(compute)

    calls: list[int] = []
    a, b, index = leaf(normal(3, 2)), leaf(normal(2)), Tensor([0, 2])
    out = weighted(a, b, index, power=3)
    assert weighted.name == "weighted" and weighted.__doc__ == "(a * b) ** power, chosen."
    out.sum().backward()
    cube = (leaf_a := leaf(a.numpy())) * (leaf_b := leaf(b.numpy()))
    (cube * cube * cube)[[0, 2]].sum().backward()
    np.testing.assert_allclose(a.gradient, leaf_a.gradient, rtol=1e-12)  # type: ignore[arg-type]
    np.testing.assert_allclose(b.gradient, leaf_b.gradient, rtol=1e-12)  # type: ignore[arg-type]
    assert len(calls) == 2


def test_a_primitive_may_return_a_numpy_scalar() -> None:
    @primitive
    def total(ctx: Context, a: Array) -> Array:
        return a.sum()

    total.adjoint(lambda ctx, g: np.broadcast_to(g, ctx.shapes[0]))
    x = leaf(normal(3))
    out = total(x)
    assert type(out.data) is np.ndarray and out.dtype == np.float64
    (out * out).backward()
    np.testing.assert_allclose(x.gradient, [2 * x.numpy().sum()] * 3)


def test_only_wanted_gradients_are_computed() -> None:
    calls: list[str] = []
    operation = noting("", calls)
    x = leaf(normal(2))
    operation(x, Tensor(normal(2))).sum().backward()
    operation(normal(2), x).sum().backward()
    assert calls == ["a", "b"]
    assert pointwise.add(normal(2), 1.0).ctx is None


def test_of_operators_from_elsewhere_it_is_not_known_what_they_add_to() -> None:
    """Nor of those that no module names, as what a compiler makes."""
    x = leaf(normal(3))

    def handed_on(ctx: Context, a: Array) -> Array:
        return a

    for module, known in (("hpcml.nn", True), ("elsewhere", False), (None, False)):
        handed_on.__module__ = module  # type: ignore[assignment]
        operation = primitive(handed_on)
        operation.adjoint(lambda ctx, g: g)
        assert list(contributions(operation(x))) == ([x] if known else [None, x])
