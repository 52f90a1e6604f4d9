"""Kernels of the GPU, run on the CPU, against their specification in float64.

All types of elements, sizes that do not divide, arrays that are not aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.bench.profile_hooks import kernels_of
from hpcml.kernels import cpu, generic, of
from tests.device.support import FIRST, KEY, Numbers, few, host, skewed

IGNORE = -100

ONE = ("gelu", "gelu_tanh")
TWO = ("gelu_backward", "gelu_tanh_backward", "relu_backward")


def test_kernels_are_the_same_by_name_on_all_devices(cuda: Any) -> None:
    names = [{name for name, _ in kernels_of(module)} for module in (cpu, cuda, generic)]
    assert names[0] == names[1] <= names[2] and len(names[0]) > 20


@pytest.mark.parametrize("size", [0, 1, 37, 3000])
@pytest.mark.parametrize("aligned", [True, False])
def test_elements(size: int, aligned: bool, numbers: Numbers, cuda: Any) -> None:
    for name in ONE + TWO:
        pairs = [numbers.normal(size + i, scale=3) for i in range(2 if name in TWO else 1)]
        pairs = [(x[:size], y[:size]) for x, y in pairs]
        arrays = [x if aligned else skewed(numbers.device, x) for x, _ in pairs]
        out, expected = numbers.empty(size)
        getattr(cuda, name)(*arrays, out)
        getattr(generic, name)(*[y for _, y in pairs], expected)
        numbers.close(out, expected, 2, scale=0.1)


def test_the_tail_of_gelu_keeps_its_digits(numbers: Numbers, cuda: Any) -> None:
    x, exact = numbers.pair([-3.0, -5.0])
    out, expected = numbers.empty(2)
    cuda.gelu(x, out)
    generic.gelu(exact, expected)
    if numbers.dtype.name != "float16":  # which has few digits for numbers this small
        np.testing.assert_allclose(host(out).astype(float), expected, rtol=1e-2)


@pytest.mark.parametrize("size", [1, 300])
def test_updates(size: int, numbers: Numbers, cuda: Any) -> None:
    """Gradients of any type, parameters and moments of that of sums."""
    p, m = (numbers.normal(size, sums=True, scale=s) for s in (1, 0.1))
    v = numbers.pair(np.abs(numbers.normal(size)[1]), sums=True)
    g = numbers.normal(size, scale=2)
    for decoupled in (True, False):
        numbers_of_step = (0.5, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.2, 0.3, decoupled)
        for pair in (p, m, v):
            pair[0][...] = numbers.device.asarray(pair[1].astype(numbers.sums))
        found, exact = (list(x) for x in zip(p, g, m, v, strict=True))
        exact = [x.copy() for x in exact]
        cuda.adam_update(*found, *numbers_of_step)
        generic.adam_update(*exact, *numbers_of_step)
        for array, expected in zip(found, exact, strict=True):
            numbers.close(array, expected, 3)
    for name, with_velocity, more in (
        ("sgd_update", True, (0.5, 0.1, 0.9, 0.8, 0.01, True)),
        ("sgd_update", True, (0.5, 0.1, 0.9, 0.8, 0.01, False)),
        ("sgd_plain_update", False, (0.5, 0.1, 0.01)),
    ):
        pairs = [p, g, m] if with_velocity else [p, g]
        for pair in (p, m):
            pair[0][...] = numbers.device.asarray(pair[1].astype(numbers.sums))
        found, exact = [x for x, _ in pairs], [x.copy() for _, x in pairs]
        getattr(cuda, name)(*found, *more)
        getattr(generic, name)(*exact, *more)
        for array, expected in zip(found, exact, strict=True):
            numbers.close(array, expected, 3)


def test_sums_of_squares(numbers: Numbers, cuda: Any) -> None:
    x, exact = numbers.normal(5 * 200)
    out, expected = numbers.device.empty(5, np.float64), np.empty(5)
    cuda.block_squares(x, 200, out)
    generic.block_squares(exact, 200, expected)
    np.testing.assert_allclose(host(out), expected, rtol=1e-13)


ROWS = [(0, 5), (1, 1), (5, 7), (9, 64), (70, 65), (3, 1000)]


@few
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(("weighted", "biased"), [(1, 1), (1, 0), (0, 0)])
def test_layer_norm(
    shape: tuple[int, int], weighted: int, biased: int, numbers: Numbers, cuda: Any
) -> None:
    rows, n = shape
    x = numbers.normal(rows, n, scale=3, shift=2)
    weight, bias = numbers.normal(n * weighted), numbers.normal(n * biased)
    out, mean, inverse = numbers.empty(rows, n), *(numbers.empty(rows, sums=True) for _ in "mi")
    arrays = zip(x, weight, bias, (1e-5, 1e-5), out, mean, inverse, strict=True)
    found, exact = arrays
    cuda.layer_norm(*found)
    generic.layer_norm(*exact)
    for actual, expected in (out, mean, inverse):
        numbers.close(actual, expected, 3)


@few
@pytest.mark.parametrize("shape", ROWS[1:])
@pytest.mark.parametrize(("weighted", "pending"), [(1, 0), (0, 1), (1, 1)])
def test_gradients_of_layer_norm(
    shape: tuple[int, int], weighted: int, pending: int, numbers: Numbers, cuda: Any
) -> None:
    rows, n = shape
    x, g, weight = numbers.normal(rows, n), numbers.normal(rows, n, scale=2), numbers.normal(n)
    if not weighted:
        weight = weight[0][:0], weight[1][:0]
    before = numbers.normal(rows * pending, n)
    mean = numbers.pair(x[1].mean(1), sums=True)
    inverse = numbers.pair(1 / np.sqrt(x[1].var(1) + 1e-5), sums=True)
    out, sums = numbers.empty(rows, n), numbers.empty(n)
    found, exact = zip(g, x, weight, mean, inverse, before, out, strict=True)
    cuda.layer_norm_backward(*found)
    generic.layer_norm_backward(*exact)
    numbers.close(*out, 5 if n > 1 else 1e3)  # one column: all cancels, times 1 / sqrt(eps)
    found, exact = zip(g, x, mean, inverse, sums, strict=True)
    cuda.layer_norm_weight_gradient(*found)
    generic.layer_norm_weight_gradient(*exact)
    numbers.close(*sums, 3)


@few
@pytest.mark.parametrize("shape", [(1, 1), (130, 7), (700, 72)])
def test_sums_of_columns(shape: tuple[int, int], numbers: Numbers, cuda: Any) -> None:
    x, out = numbers.normal(*shape), numbers.empty(shape[1])
    cuda.column_sums(x[0], out[0])
    generic.column_sums(x[1], out[1])
    numbers.close(*out, 3)


@few
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 64), (6, 1000)])
def test_cross_entropy(shape: tuple[int, int], numbers: Numbers, cuda: Any) -> None:
    rows, n = shape
    logits = numbers.normal(rows, n, scale=5)
    target = np.arange(rows) * 7 % n
    target[1::4] = IGNORE
    where = numbers.device.asarray(target), target
    loss, lse = numbers.empty(rows, sums=True), numbers.empty(rows, sums=True)
    found, exact = zip(logits, where, (IGNORE, IGNORE), loss, lse, strict=True)
    cuda.cross_entropy(*found)
    generic.cross_entropy(*exact)
    numbers.close(*loss, 2)
    numbers.close(*lse, 2)
    target[2::3] = n + 3  # on another rank
    where[0][...] = numbers.device.asarray(target)
    g, out = numbers.normal(rows, sums=True), numbers.empty(rows, n)
    found, exact = zip(logits, where, (IGNORE, IGNORE), lse, g, out, strict=True)
    cuda.cross_entropy_backward(*found)
    generic.cross_entropy_backward(*exact)
    numbers.close(*out, 3)


@few
def test_losses_of_logits_that_are_large_or_not_finite(numbers: Numbers, cuda: Any) -> None:
    big = np.zeros((6, 70))
    big[0, 3], big[1, 3], big[2, 60], big[4] = 1e4, -np.inf, np.nan, -np.inf
    target = numbers.device.asarray(np.array([3, 3, 3, 3, 3, 70]))
    logits = numbers.pair(big)[0]
    loss, lse = numbers.empty(6, sums=True)[0], numbers.empty(6, sums=True)[0]
    cuda.cross_entropy(logits, target, IGNORE, loss, lse)
    assert host(loss)[0] == 0
    assert host(loss)[1] == np.inf
    assert np.isnan(host(loss)[2])
    assert host(loss)[3] == pytest.approx(np.log(70), rel=1e-5)
    assert not np.isfinite(host(loss)[4])
    assert np.isnan(host(loss)[5])


@few
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (50, 5), (300, 64)])
def test_gradient_of_an_embedding(rows: int, n: int, numbers: Numbers, cuda: Any) -> None:
    """Row after row: the bits of the CPU; indices out of range add nothing."""
    g, table = numbers.normal(rows, n), numbers.normal(11, n)
    index = np.arange(rows) * 5 % 9
    index[7::40] = 11 - 12 * (rows > 50)  # no row of the table: nothing is written beside it
    there = (index >= 0) & (index < 11)
    exact = table[1].astype(numbers.sums)
    np.add.at(exact, index[there], g[1].astype(numbers.sums)[there])
    cuda.embedding_backward(g[0], numbers.device.asarray(index), table[0])
    assert host(table[0]).tobytes() == exact.astype(numbers.dtype).tobytes()


@pytest.mark.parametrize(("start", "count"), [(0, 1), (3, 100), ((1 << 34) + 1, 4099)])
def test_random_numbers_are_those_of_the_cpu(
    start: int, count: int, device: Any, cuda: Any
) -> None:
    of(np.empty(0, np.float32))
    for name, dtype in (
        ("random_words", "uint32"), ("random_uniform", "float32"), ("random_normal", "float32"),
    ):  # fmt: skip
        out, expected = device.empty(count, np.dtype(dtype)), np.empty(count, dtype)
        getattr(cuda, name)(KEY, start, out)
        getattr(cpu, name)(KEY, start, expected)
        if name == "random_normal":
            np.testing.assert_allclose(host(out), expected, rtol=1e-6, atol=1e-7)
        else:
            assert host(out).tobytes() == expected.tobytes()


@few
@pytest.mark.parametrize(
    ("runs", "period", "n"),
    [([(0, 50)], 50, 50), ([(5, 3)], 10, 30), ([(1, 2), (4, 0), (6, 5)], 20, 70),
     ([(4093, 10)], 8192, 10)],
)  # fmt: skip
def test_masks_of_dropout_are_those_of_the_cpu(
    runs: Any, period: int, n: int, numbers: Numbers, cuda: Any
) -> None:
    of(np.empty(0, np.float64))
    x, out = numbers.normal(3, n), numbers.empty(3, n)
    where = np.array(runs, np.int64)
    more = KEY, FIRST, np.uint32(0.4 * 2**32), where, period
    cuda.dropout(x[0], *more, out[0])
    cpu.dropout(x[1], *more, out[1])
    assert ((host(out[0]) != 0) == (out[1] != 0)).all()
    numbers.close(*out, 2)
