"""Element-wise kernels: values against the specification and PyTorch, extremes, equal bits."""

from __future__ import annotations

import inspect
import math
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

from hpcml.kernels import cpu, generic, generic_images, of
from hpcml.kernels.cpu import images
from hpcml.kernels.cpu.team import Divided
from tests.kernels.support import DTYPES, SIZES, bits, close, randoms

GELUS = ["gelu", "gelu_tanh"]
OFFSETS = [(0, 5), (1, 8), (3, 66), (17, 300), (299, 300), (5, 5)]


@pytest.fixture(params=DTYPES, autouse=True)
def dtype(request: pytest.FixtureRequest) -> str:
    of(np.empty(0, request.param))  # loads the compiled kernels
    return str(request.param)


@pytest.mark.parametrize(
    ("fast", "plain", "count"), [(cpu, generic, 27), (images, generic_images, 11)]
)
def test_cpu_and_generic_have_the_same_kernels(
    fast: ModuleType, plain: ModuleType, count: int
) -> None:
    def kernels(module: Any) -> dict[str, list[str]]:
        values = {
            name: value.compiled if isinstance(value, Divided) else value
            for name, value in vars(module).items()
        }
        functions = {name: getattr(value, "py_func", value) for name, value in values.items()}
        own = ("low", "high")  # what the team adds to the arguments
        return {
            name: [x for x in inspect.signature(function).parameters if x not in own]
            for name, function in functions.items()
            if isinstance(function, FunctionType)
            and function.__module__.startswith(module.__name__)
            and not name.startswith("_")
        }

    compiled = kernels(fast)
    compiled.pop("load")
    assert len(compiled) == count
    assert compiled == kernels(plain)


def test_which_module_serves_an_array(dtype: str) -> None:
    assert of(np.empty(3, dtype)) is cpu
    assert of(np.empty(3, np.float16)) is generic
    assert of(np.empty(3, np.int64)) is generic


def test_other_types_are_an_error_not_a_silent_compilation(dtype: str) -> None:
    with pytest.raises(TypeError):
        cpu.gelu(np.zeros(3, np.float16), np.zeros(3, np.float16))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GELUS)
def test_gelu(name: str, size: int, dtype: str) -> None:
    x, g = randoms(dtype, (size,), (size,))
    x *= 3
    out, expected = np.empty_like(x), np.empty(size)
    getattr(cpu, name)(x, out)
    getattr(generic, name)(x.astype(np.float64), expected)
    close(out, expected, dtype)
    getattr(cpu, name + "_backward")(g, x, out)
    getattr(generic, name + "_backward")(g.astype(np.float64), x.astype(np.float64), expected)
    close(out, expected, dtype)


@pytest.mark.parametrize(("name", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_against_pytorch(name: str, approximate: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x, g = randoms(dtype, (300,), (300,))
    leaf = torch.from_numpy(x).double().requires_grad_()
    expected = torch.nn.functional.gelu(leaf, approximate=approximate)
    expected.backward(torch.from_numpy(g).double())
    out, gradient = np.empty_like(x), np.empty_like(x)
    getattr(cpu, name)(x, out)
    getattr(cpu, name + "_backward")(g, x, gradient)
    close(out, expected.detach(), dtype)
    close(gradient, leaf.grad, dtype)


@pytest.mark.parametrize("name", GELUS)
def test_gelu_at_extremes(name: str, dtype: str) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0, tiny, -tiny, 1e-20, -100, 100, -1e4, 1e4, -1e10, 1e10, np.inf, np.nan], dtype)
    out, slope = np.empty_like(x), np.empty_like(x)
    getattr(cpu, name)(x, out)
    getattr(cpu, name + "_backward")(np.ones_like(x), x, slope)
    close(out[:4], x[:4] / 2, dtype)
    assert list(out[4:-1]) == [0, 100, 0, x[7], 0, x[9], np.inf]
    close(slope[:4], np.full(4, 0.5), dtype)
    assert list(slope[4:10]) == [0, 1, 0, 1, 0, 1]
    assert np.isnan(out[-1])
    assert np.isnan(slope[-1])


@pytest.mark.parametrize("name", GELUS)
def test_gelu_is_as_exact_as_it_says_all_over_the_line(name: str, dtype: str) -> None:
    x = np.linspace(-14, 14, 20_001).astype(dtype)
    out, expected = np.empty_like(x), np.empty(x.size)
    getattr(cpu, name)(x, out)
    getattr(generic, name)(x.astype(np.float64), expected)
    limit = {"float32": 4e-7, "float64": 1e-15}[dtype]
    assert np.all(np.abs(out - expected) <= limit * np.maximum(np.abs(x), 1))


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_column_sums(rows: int, columns: int, dtype: str) -> None:
    (x,) = randoms(dtype, (rows, columns))
    sums = np.full(columns, np.nan, dtype)
    cpu.column_sums(x, sums)
    close(sums, x.astype(np.float64).sum(0), dtype)


def adam(module: Any, arrays: list[Any], dtype: str, decoupled: bool) -> None:
    numbers = (0.5, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1 - 0.9**3, math.sqrt(1 - 0.99**3))
    module.adam_update(*arrays, *(np.dtype(dtype).type(x) for x in numbers), decoupled)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(size: int, decoupled: bool, dtype: str) -> None:
    arrays = randoms(dtype, (size,), (size,), (size,), (size,))
    arrays[3] *= arrays[3]  # the mean of squares is not negative
    expected = [array.astype(np.float64) for array in arrays]
    adam(generic, expected, "float64", decoupled)
    adam(cpu, arrays, dtype, decoupled)
    for actual, wanted in zip(arrays, expected, strict=True):
        close(actual, wanted, dtype)


@pytest.mark.parametrize(("name", "decoupled"), [("Adam", False), ("AdamW", True)])
def test_adam_against_pytorch(name: str, decoupled: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    p, *gradients = randoms(dtype, *[(65,)] * 6)
    peer = torch.from_numpy(p.astype(np.float64)).requires_grad_()
    optimizer = getattr(torch.optim, name)(
        [peer], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8
    )
    m, v, real = np.zeros_like(p), np.zeros_like(p), np.dtype(dtype).type
    for t, g in enumerate(gradients, 1):
        peer.grad = torch.from_numpy(g.astype(np.float64))
        optimizer.step()
        numbers = (1.0, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1 - 0.9**t, math.sqrt(1 - 0.99**t))
        cpu.adam_update(p, g, m, v, *map(real, numbers), decoupled)
    close(p, peer.detach(), dtype, 5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_against_generic_and_pytorch(nesterov: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    p, *gradients = randoms(dtype, *[(65,)] * 5)
    peer = torch.from_numpy(p.astype(np.float64)).requires_grad_()
    optimizer = torch.optim.SGD([peer], 0.1, 0.9, 0.0, 0.01, nesterov)
    velocity, real = np.zeros_like(p), np.dtype(dtype).type
    expected = [p.astype(np.float64), np.zeros(65)]
    for g in gradients:
        peer.grad = torch.from_numpy(g.astype(np.float64))
        optimizer.step()
        numbers = (1.0, 0.1, 0.9, 1.0, 0.01)
        cpu.sgd_update(p, g, velocity, *map(real, numbers), nesterov)
        generic.sgd_update(expected[0], g.astype(np.float64), expected[1], *numbers, nesterov)
    close(p, expected[0], dtype)
    close(velocity, expected[1], dtype)
    close(p, peer.detach(), dtype)


def test_not_finite_gradients_stay_visible_in_the_update(dtype: str) -> None:
    arrays = [np.ones(9, dtype) for _ in range(4)]
    arrays[1][[2, 5]] = np.nan, np.inf
    adam(cpu, arrays, dtype, True)
    p, _, m, v = arrays
    assert np.isnan(p[2]) and np.isnan(m[2]) and np.isnan(v[2])
    assert not np.isfinite(p[5]) and np.isinf(m[5]) and np.isinf(v[5])
    assert np.isfinite(np.delete(p, [2, 5])).all()


@pytest.mark.parametrize("block", [1, 16, 48, 64, 300, 4096])
def test_block_squares(block: int, dtype: str) -> None:
    (x,) = randoms(dtype, (3 * block,))
    found, plain = np.empty(4), np.empty(4)
    cpu.block_squares(x, block, found)
    generic.block_squares(x, block, plain)
    for k in range(3):
        exact = math.fsum(float(number) ** 2 for number in x[k * block : (k + 1) * block])
        assert found[k] == pytest.approx(exact, rel=1e-13, abs=0)
        assert plain[k] == pytest.approx(exact, rel=1e-13, abs=0)


def test_block_squares_do_not_depend_on_where_a_slice_starts(dtype: str) -> None:
    (x,) = randoms(dtype, (5 * 48,))
    whole, part = np.empty(5), np.empty(5)
    cpu.block_squares(x, 48, whole)
    for k in range(5):
        cpu.block_squares(x[k * 48 :], 48, part[k:])
    np.testing.assert_array_equal(part, whole)


def test_block_squares_do_not_overflow_and_show_nan(dtype: str) -> None:
    out = np.empty(1)
    cpu.block_squares(np.full(3, 1e30, dtype), 3, out)
    assert out[0] == pytest.approx(3e60, rel=1e-6)
    x = np.ones(300, dtype)
    x[200] = np.nan
    cpu.block_squares(x, 300, out)
    assert math.isnan(out[0])


@pytest.mark.parametrize(("first", "last"), OFFSETS)
def test_same_bits_wherever_a_slice_starts(first: int, last: int, dtype: str) -> None:
    part = slice(first, last)
    x, g, m, v = randoms(dtype, (300,), (300,), (300,), (300,))
    v *= v
    for name in GELUS:
        whole, some = np.empty_like(x), np.empty_like(x)
        getattr(cpu, name)(x, whole)
        getattr(cpu, name)(x[part], some[part])
        assert bits(some[part]) == bits(whole[part])
        getattr(cpu, name + "_backward")(g, x, whole)
        getattr(cpu, name + "_backward")(g[part], x[part], some[part])
        assert bits(some[part]) == bits(whole[part])
    for decoupled in (False, True):
        wholes, somes = ([a.copy() for a in (x, g, m, v)] for _ in range(2))
        adam(cpu, wholes, dtype, decoupled)
        adam(cpu, [a[part] for a in somes], dtype, decoupled)
        assert bits(*(a[part] for a in somes)) == bits(*(a[part] for a in wholes))
    wholes, somes = ([a.copy() for a in (x, g, m)] for _ in range(2))
    real = np.dtype(dtype).type
    numbers = [real(number) for number in (0.5, 0.1, 0.9, 0.8, 0.01)]
    cpu.sgd_update(*wholes, *numbers, True)
    cpu.sgd_update(*(a[part] for a in somes), *numbers, True)
    assert bits(*(a[part] for a in somes)) == bits(*(a[part] for a in wholes))


def test_inputs_may_be_read_only(dtype: str) -> None:
    x, out = np.ones((3, 5), dtype), np.empty((3, 5), dtype)
    x.flags.writeable = False
    target, number = np.broadcast_to(np.int64(1), (3,)).copy(), x.dtype.type(0.1)
    target.flags.writeable = False
    row, flat, some = x[0], x.reshape(-1), np.empty(3, dtype)
    other, four = np.empty_like(some), x.reshape(1, 1, 3, 5)
    never = (np.uint64(0), np.uint64(0), np.uint32(0))
    for name in GELUS:
        getattr(cpu, name)(flat, out.reshape(-1))
        getattr(cpu, name + "_backward")(flat, flat, out.reshape(-1))
    cpu.column_sums(x, out[0])
    total = np.empty(1)
    cpu.block_squares(flat, 15, total)
    assert total[0] == 15
    cpu.adam_update(out[0], row, out[1], out[2], *[number] * 8, True)
    cpu.sgd_update(out[0], row, out[1], *[number] * 5, True)
    cpu.layer_norm(x, row, row, number, out, some, other)
    cpu.layer_norm_backward(x, x, row, x[:, 0].copy(), x[:, 0].copy(), x, out)
    cpu.layer_norm_weight_gradient(x, x, some, other, out[0])
    cpu.cross_entropy(x, target, -100, some, other)
    cpu.cross_entropy_backward(x, target, -100, other, x.reshape(-1)[:3], out)
    cpu.embedding_backward(x, target, out)
    cpu.dropout(x, *never, np.array([[0, x.shape[1]]]), x.shape[1], out)
    assert bits(out) == bits(x)
    lse = np.empty((1, 1, 3), dtype)
    result = out.reshape(four.shape)
    cpu.join_attention(result, lse, four, flat[:3].reshape(lse.shape))
    how = (number, True, *never, 0, 0, 0)
    cpu.attention(four, four, four, *how, result, lse)
    gradients = [np.empty_like(result) for _ in range(3)]
    cpu.attention_backward(four, four, four, result, lse, four, *how, False, *gradients)
    close(result, four, dtype)
    with pytest.raises(TypeError):
        cpu.gelu(flat, flat)
