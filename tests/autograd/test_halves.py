"""bfloat16 and float16: operations compute in float32 and round what they return and keep."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml import backend, memory
from hpcml.autograd import Context, Primitive, Tensor, gradcheck, primitive, saved_tensors_hooks
from hpcml.autograd.ops import attention, fused, linear, norm, pointwise, shape
from hpcml.nn import Parameter
from tests.autograd.cases import TABLE
from tests.autograd.support import Array, layouts, leaf, normal

HALVES = ["bf16", "fp16"]
EPSILON = {"bf16": 2.0**-7, "fp16": 2.0**-10}

pytestmark = pytest.mark.parametrize("name", HALVES)


def half(x: Any, name: str) -> Array:
    return np.asarray(x).astype(backend.dtype(name))


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.float32)


def round_(x: Any, name: str) -> Array:
    """float32 numbers that `name` can hold."""
    return wide(half(x, name))


def live() -> int:
    gc.collect()
    return memory.account().live["activations"]


def peak(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of activations beyond those before while `function` runs; its result."""
    before = live()
    memory.account().reset_peak()
    result = function()
    return memory.account().peak["activations"] - before, result


def evaluate(function: Callable[..., Tensor], inputs: list[Array], name: str) -> list[Array]:
    """The result and the gradients, for an output gradient of 16 bits."""
    out: Any = None

    def unpack(array: Array) -> Array:
        """In float32, the result as the 16-bit computation has kept it."""
        same = array is out.data and array.dtype == np.float32 and array.ndim > 0
        return round_(array, name) if same else array

    leaves = [leaf(x) for x in inputs]
    with saved_tensors_hooks(lambda array: array, unpack):
        out = function(*leaves)
    out.backward(half(normal(*out.shape, salt=7), name).astype(out.dtype))
    return [out.data, *[x.gradient for x in leaves]]  # type: ignore[list-item]


@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_results_are_those_of_float32_rounded(operation: Primitive, name: str) -> None:
    for function, arrays in TABLE[operation]:
        inputs = [half(x, name) for x in arrays]
        found = evaluate(function, inputs, name)
        expected = evaluate(function, [wide(x) for x in inputs], name)
        if operation is not pointwise.cast:
            kept = operation.moves or found[0].ndim > 0
            assert found[0].dtype == (inputs[0].dtype if kept else np.float32)
        assert {x.dtype for x in found[1:]} == {inputs[0].dtype}
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.astype(np.float64), b.astype(a.dtype).astype(float))


@pytest.mark.parametrize("operation", TABLE, ids=lambda operation: operation.name)
def test_layouts_change_nothing(operation: Primitive, name: str) -> None:
    for function, arrays in TABLE[operation][:3]:
        inputs = [layouts(half(x, name)) for x in arrays]
        expected = evaluate(function, [x["plain"] for x in inputs], name)
        for kind in ("transposed", "strided", "reversed", "frozen"):
            found = evaluate(function, [x[kind] for x in inputs], name)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(wide(a), wide(b))


def test_contributions_are_added_in_float32_and_rounded_each(name: str) -> None:
    x = half(normal(50), name)
    factors = [half(normal(50, salt=i), name) for i in range(1, 5)]
    g = half(normal(50, salt=9), name)
    for through in (False, True):  # at a leaf, and at a result
        start = leaf(x)
        y = start * 1.0 if through else start
        parts = [y * Tensor(f) for f in factors]
        total = parts[0] + parts[1] + parts[2] + parts[3]
        total.backward(g)
        expected = np.zeros(50, np.float32)
        for f in factors[::-1]:  # the last use first
            expected = round_(expected + wide(g) * wide(f), name)
        np.testing.assert_array_equal(wide(start.gradient), expected)
        start.gradient_buffer = buffer = half(np.full((50, 2), 99.0), name)[:, 1]  # strided
        start.grad = None
        (start * Tensor(g) + start * Tensor(g)).backward(np.ones(50))
        assert start.gradient is buffer
        np.testing.assert_array_equal(wide(buffer), round_(2 * wide(g), name))


def test_a_residual_branch_is_added_before_rounding(name: str) -> None:
    """Layer norm adds what its input has got: once rounded, not twice."""
    x, g = half(normal(6, 8), name), half(normal(6, 8, salt=1), name)
    gradients = []
    for array in (x, wide(x)):
        y = leaf(array)
        (y + norm.layer_norm(y, None, None, size=8, eps=1e-5)).backward(g.astype(array.dtype))
        gradients.append(wide(y.gradient))
    np.testing.assert_array_equal(gradients[0], round_(gradients[1], name))


def test_many_small_gradients_of_a_row_are_not_lost(name: str) -> None:
    """A token that comes 4096 times: its gradients are added in float32, not in 16 bits."""
    table = leaf(half(normal(7, 4), name))
    fused.embedding(table, np.full(4096, 3)).backward(np.ones((4096, 4)))
    expected = np.zeros((7, 4))
    expected[3] = 4096
    np.testing.assert_array_equal(wide(table.gradient), expected)
    several = leaf(half(normal(7), name))
    several[np.full(4096, 3)].backward(np.ones(4096))
    np.testing.assert_array_equal(wide(several.gradient), expected[:, 0])
    one = leaf(half(np.ones(1), name))
    one.expand(4096).backward(np.ones(4096))
    np.testing.assert_array_equal(wide(one.gradient), [4096])


def test_sums_are_float32_and_so_is_a_loss(name: str) -> None:
    x = leaf(half(np.ones(5000), name))
    assert x.sum().item() == 5000 and x.sum().dtype == x.mean().dtype == np.float32
    logits = leaf(half(normal(4, 5), name))
    loss = fused.cross_entropy(logits, np.array([0, 1, 2, 3]))
    assert loss.dtype == np.float32
    assert (logits / logits.sum()).dtype == logits.dtype  # what has no dimensions yields
    assert logits.sum(0).dtype == logits.dtype


def test_types_that_meet(name: str) -> None:
    x = Tensor(half(normal(2, 3), name))
    other = Tensor(half(normal(2, 3), "fp16" if name == "bf16" else "bf16"))
    for y in (x * 2, x + 0.5, 1 / x, x * np.arange(3), x * np.float64(2), x**2, 2**x):
        assert y.dtype == x.dtype
    assert (x + normal(2, 3)).dtype == np.float64
    assert (x + Tensor(normal(3, dtype="float32"))).dtype == np.float32
    assert (x + other).dtype == np.float32 and (x @ x.T).dtype == x.dtype
    weight = leaf(normal(5, 3, dtype="float32"))
    for mix in (lambda: linear.linear(x, weight, None), lambda: x @ weight.T):
        with pytest.raises(TypeError, match=f"{x.dtype}.* of float32.*convert them to one type"):
            mix()
    y = leaf(normal(2, 3, dtype="float32"))
    (x * y).backward(np.ones((2, 3)))
    np.testing.assert_array_equal(y.gradient, wide(x))  # type: ignore[arg-type]


def test_conversions(name: str) -> None:
    values = normal(4, 5, dtype="float32")
    x = leaf(values)
    y = x.to(name)
    np.testing.assert_array_equal(wide(y.data), round_(values, name))
    np.testing.assert_array_equal(y.float().data, round_(values, name))
    np.testing.assert_array_equal(y.double().data, round_(values, name).astype(float))
    assert y.to(name).data is y.data
    y.float().backward(values)
    assert x.gradient is not None and x.gradient.dtype == np.float32
    np.testing.assert_array_equal(x.gradient, round_(values, name))
    z = Tensor(half([0.5, -2.0], name))
    assert z.tolist() == [0.5, -2.0] and type(z[0].item()) is float and float(z[1]) == -2
    assert repr(Tensor(half([1 / 3], name)))[:14] in ("tensor([0.334]", "tensor([0.3333")
    assert repr(z) == f"tensor([ 0.5, -2. ], dtype={z.dtype})"
    assert z.argmax().item() == 0 and (z > 0).tolist() == [True, False]


def test_what_is_too_large_is_infinite_and_no_number_stays_none(name: str) -> None:
    largest = (2 - EPSILON[name]) * {"bf16": 2.0**127, "fp16": 2.0**15}[name]
    x = leaf(half([largest, np.nan, -np.inf], name))
    assert np.isfinite(wide(x.data)[0])
    y = x * (1 + EPSILON[name] / 2)
    np.testing.assert_array_equal(wide(y.data), [np.inf, np.nan, -np.inf])
    y.backward(half([1, -np.inf, np.nan], name))
    np.testing.assert_array_equal(wide(x.gradient), [1, -np.inf, np.nan])


def test_inputs_and_results_are_kept_in_sixteen_bits(name: str) -> None:
    kept: list[Array] = []

    def pack(array: Array) -> Array:
        kept.append(array)
        return array

    def saved(function: Callable[[], Tensor]) -> list[Array]:
        """What hooks see of it, and last the result."""
        kept.clear()
        with saved_tensors_hooks(pack, lambda array: array):
            out = function()
        return [*kept, out.data]

    x = leaf(half(normal(4, 6), name))
    first, second, _ = saved(lambda: x * x)
    assert first is second is x.data
    kept_result, result = saved(x.tanh)
    assert kept_result is result and result.dtype == x.dtype
    logits, logarithms, _ = saved(lambda: fused.cross_entropy(x, np.array([0, 1, 2, 3])))
    assert logits is x.data and logarithms.dtype == np.float32
    qkv = leaf(half(normal(2, 5, 12), name))
    packed, out, logarithms, result = saved(
        lambda: attention.packed_attention(qkv, heads=2, causal=True)
    )
    assert packed is qkv.data and out is result and logarithms.dtype == np.float32


def test_parameters_are_asked_again(name: str) -> None:
    p, x = Parameter(half(normal(3), name)), leaf(half(normal(3, salt=1), name))
    packed: list[Array] = []
    with saved_tensors_hooks(lambda a: packed.append(a) or a, lambda a: a):
        out = x * p
    assert len(packed) == 1 and packed[0] is x.data
    p.data = half(2 * wide(p.data), name)
    out.backward(np.ones(3))
    np.testing.assert_array_equal(wide(x.gradient), wide(p.data))


def test_float32_lives_no_longer_than_its_primitive(name: str) -> None:
    n = 1 << 14
    a, b = leaf(half(np.ones(n), name)), leaf(half(np.ones(n), name))
    before = live()
    most, out = peak(lambda: a * b)
    assert live() - before == 2 * n == out.data.nbytes
    assert most == 4 * n * 3  # both inputs and the result; gone before it is rounded
    most, _ = peak(lambda: out.backward(half(np.ones(n), name)))
    assert most <= 4 * n * 4 + 2 * n * 2  # a, b, the gradient and one result; two gradients
    assert live() - before == 2 * n * 3
    most, _ = peak(lambda: a.detach() * b.detach())
    assert most == 4 * n * 3


def test_views_stay_views_and_a_table_is_never_widened(name: str) -> None:
    table = leaf(half(normal(1000, 16), name))
    views = table.reshape(16, 1000), table.T, table[3:], table[:, None], table.expand(2, -1, -1)
    for view in views:
        assert np.shares_memory(view.data, table.data) and view.dtype == table.dtype
    index = np.array([3, 5, 3])
    most, out = peak(lambda: fused.embedding(table, index))
    assert most == 3 * 16 * 2
    most, _ = peak(lambda: out.backward(np.ones((3, 16))))
    assert most < 1.1 * table.data.nbytes  # its gradient, and a few rows
    pieces = table.split(500)
    most, _ = peak(lambda: shape.cat([p * 1.0 for p in pieces]).sum())
    assert most < 10 * table.data.nbytes


def test_gradcheck(name: str) -> None:
    def network(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return norm.layer_norm(linear.linear(x, w, b), None, None, size=4, eps=1e-5).tanh()

    inputs = [leaf(half(normal(*s), name)) for s in ((5, 3), (4, 3), (4,))]
    before = [x.data for x in inputs]
    assert gradcheck(network, inputs)
    assert all(x.data is array for x, array in zip(inputs, before, strict=True))

    @primitive
    def wrong(ctx: Context, a: Array) -> Array:
        ctx.save(a)
        return a * a

    wrong.adjoint(lambda ctx, g: g * ctx.saved[0] * 2.2)
    with pytest.raises(AssertionError, match="gradcheck: input 0"):
        gradcheck(wrong, [leaf(half(normal(30), name))])


def test_the_record_keeps_no_float32(name: str) -> None:
    """Not even that of an input that came as a view, or of a result that is an input."""

    @primitive
    def same(ctx: Context, a: Array) -> Array:
        ctx.save(a)
        return a

    same.adjoint(lambda ctx, g: g + 0 * ctx.saved[0])
    x = leaf(half(normal(8, 8), name))
    out = same(x.T)
    assert out.dtype == x.dtype and np.shares_memory(out.data, x.data)
    out.backward(half(normal(8, 8), name))
    np.testing.assert_array_equal(wide(x.gradient), wide(half(normal(8, 8), name)).T)
    y = x.exp()
    block = weakref.ref(y.data.base)
    z = y.reshape(64) * 2.0
    del y
    gc.collect()
    assert block() is not None  # exp keeps its result
    z.backward(np.ones(64))
    gc.collect()
    assert block() is None
