"""Kernels of the GPU, run on the CPU, against their specification in float64.

All types of elements, sizes that do not divide, arrays that are not aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.kernels import cpu, generic, generic_images, of
from tests.device import emulator
from tests.device.support import DTYPES, Numbers, host, skewed

IGNORE = -100


@pytest.fixture(params=DTYPES)
def numbers(request: pytest.FixtureRequest, device: Any) -> Numbers:
    return Numbers(device, request.param)


few = pytest.mark.parametrize("numbers", ["float32", "bfloat16"], indirect=True)
"""For what all types have in common, to spare compiling it for each."""


@pytest.fixture
def cuda(device: Any) -> Any:
    from hpcml.kernels import cuda

    return cuda


ONE = ("gelu", "gelu_tanh")
TWO = ("gelu_backward", "gelu_tanh_backward", "relu_backward")


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
    """Row after row: the bits of the CPU."""
    g, table = numbers.normal(rows, n), numbers.normal(11, n)
    index = np.arange(rows) * 5 % 9
    exact = table[1].astype(numbers.sums)
    np.add.at(exact, index, g[1].astype(numbers.sums))
    cuda.embedding_backward(g[0], numbers.device.asarray(index), table[0])
    assert host(table[0]).tobytes() == exact.astype(numbers.dtype).tobytes()


KEY, FIRST = np.uint64(0xFEDCBA9876543210), np.uint64((1 << 33) + 5)


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


ATTENTION = [  # batch, heads, queries, keys, depth
    (1, 1, 1, 1, 1), (2, 2, 65, 65, 8), (1, 1, 130, 70, 16), (1, 2, 5, 70, 24), (1, 1, 66, 3, 7),
    (0, 1, 4, 4, 4),
]  # fmt: skip
PLAIN = 0, 0, 0, 0, 0, 0
MASKED = KEY, FIRST, np.uint32(0.3 * 2**32), 2, 7, 5


@few
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize(("causal", "mask"), [(False, PLAIN), (True, PLAIN), (True, MASKED)])
def test_attention(shape: Any, causal: bool, mask: Any, numbers: Numbers, cuda: Any) -> None:
    batch, heads, queries, keys, depth = shape
    # Packed, as the projections are; rows of 16 bytes for some depths and types.
    qkv = [numbers.normal(batch, length, heads, depth, scale=s)
           for length, s in ((queries, 1.0), (keys, 1.1), (keys, 1.2), (queries, 1.3))]  # fmt: skip
    q, k, v, g = (tuple(x.transpose(0, 2, 1, 3) for x in pair) for pair in qkv)
    scale = depth**-0.5
    out, lse = (
        numbers.empty(batch, queries, heads, depth),
        numbers.empty(batch, heads, queries, sums=True),
    )
    out = tuple(x.transpose(0, 2, 1, 3) for x in out)
    how = (scale, scale), (causal, causal), *zip(mask, mask, strict=True)
    found, exact = zip(q, k, v, *how, out, lse, strict=True)
    cuda.attention(*found)
    generic.attention(*exact)
    numbers.close(*out, 4)
    numbers.close(*lse, 4)
    for more in (False, True):
        grads = [numbers.normal(*x[1].shape, scale=0.5) for x in (q, k, v)]
        rounded = numbers.pair(out[1])
        flags = (more, more)
        found, exact = zip(q, k, v, rounded, lse, g, *how, flags, *grads, strict=True)
        cuda.attention_backward(*found)
        generic.attention_backward(*exact)
        for pair in grads:
            numbers.close(*pair, 8)


def test_attention_without_tensor_cores(standing_in: Any, cuda: Any, monkeypatch: Any) -> None:
    """The products that lanes exchange numbers for, in place of those of the emulation."""
    monkeypatch.setattr(emulator, "FLAGS", (*emulator.FLAGS, "-DBY_SHUFFLES"))
    emulator.library.cache_clear()
    numbers = Numbers(standing_in, "float32")
    q, k, v = (numbers.normal(1, 1, n, 5) for n in (17, 18, 18))
    out, lse = numbers.empty(1, 1, 17, 5), numbers.empty(1, 1, 17, sums=True)
    how = (0.5, 0.5), (True, True), *zip(PLAIN, PLAIN, strict=True)
    found, exact = zip(q, k, v, *how, out, lse, strict=True)
    cuda.attention(*found)
    generic.attention(*exact)
    numbers.close(*out, 4)
    emulator.library.cache_clear()


def test_attention_with_larger_heads(device: Any, cuda: Any) -> None:
    test_attention((1, 1, 40, 33, 40), True, PLAIN, Numbers(device, "bfloat16"), cuda)


def test_heads_that_are_too_large_take_the_long_way(numbers: Numbers, cuda: Any) -> None:
    from hpcml.kernels.cuda.attention import takes

    assert takes(64, numbers.dtype)
    assert takes(128, numbers.dtype) == (numbers.dtype.name != "float64")
    assert not takes(129, numbers.dtype)


@few
def test_attention_in_two_parts(numbers: Numbers, cuda: Any) -> None:
    out, other = numbers.normal(2, 3, 9, 5), numbers.normal(2, 3, 9, 5, scale=2)
    lse, total = (numbers.normal(2, 3, 9, sums=True, scale=s) for s in (1, 2))
    found, exact = zip(out, lse, other, total, strict=True)
    cuda.join_attention(*found)
    generic.join_attention(*exact)
    numbers.close(*out, 2)
    numbers.close(*lse, 2)


def test_products(numbers: Numbers, cuda: Any) -> None:
    x, weight, bias, g = (numbers.normal(*s) for s in ((7, 5), (6, 5), (6,), (7, 6)))
    none = bias[0][:0], bias[1][:0]
    for name, arguments, shape in (
        ("linear", (x, weight, bias), (7, 6)),
        ("linear", (x, weight, none), (7, 6)),
        ("linear_input_gradient", (g, weight), (7, 5)),
        ("linear_weight_gradient", (g, x), (6, 5)),
        ("linear_weight_gradient", ((g[0][:0], g[1][:0]), (x[0][:0], x[1][:0])), (6, 5)),
    ):
        out = numbers.empty(*shape)
        found, exact = zip(*arguments, out, strict=True)
        getattr(cuda, name)(*found)
        getattr(generic, name)(*exact)
        numbers.close(*out, 3)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (3, 4, 1)),
     ((1, 4), (4, 1)), ((2, 3, 0), (2, 0, 5))],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_batches(a: Any, b: Any, turned: bool, numbers: Numbers, cuda: Any) -> None:
    def made(shape: Any) -> Any:
        pair = numbers.normal(*shape[:-2], shape[-1], shape[-2])
        return tuple(x.swapaxes(-1, -2) for x in pair) if turned else numbers.normal(*shape)

    x, y = made(a), made(b)
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    out = numbers.empty(*batch, a[-2], b[-1])
    found, exact = zip(x, y, out, strict=True)
    cuda.matmul(*found)
    generic.matmul(*exact)
    numbers.close(*out, 3)


CONVOLUTIONS: list[Any] = [
    ((2, 7, 4), (6, 4, 3), ((2,), (1,), (1,), 1)),
    ((2, 5, 4, 16), (8, 16, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((2, 6, 5, 6), (8, 3, 3, 2), ((2, 1), (1, 0), (2, 3), 2)),
    ((3, 3, 4, 9), (5, 9, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((1, 3, 5, 4, 2), (3, 2, 2, 3, 3), ((1, 2, 1), (1, 1, 0), (1, 1, 2), 1)),
]


@few
@pytest.mark.parametrize(("image", "filters", "how"), CONVOLUTIONS)
def test_convolution(
    image: Any, filters: Any, how: Any, numbers: Numbers, cuda: Any, monkeypatch: Any
) -> None:
    from hpcml.kernels.cuda import images

    monkeypatch.setattr(images, "_COLUMNS", 1)  # a sample at once
    stride, before, dilation, _ = how
    every = zip(image[1:-1], filters[2:], stride, before, dilation, strict=True)
    sizes = [(n + 2 * b - (k - 1) * d - 1) // s + 1 for n, k, s, b, d in every]
    x, w, bias = numbers.normal(*image), numbers.normal(*filters), numbers.normal(filters[0])
    g = numbers.normal(image[0], *sizes, filters[0])
    options = [(option, option) for option in how]
    none = bias[0][:0], bias[1][:0]
    for start in (bias, none, numbers.normal(*g[1].shape, scale=2)):
        out = numbers.empty(*g[1].shape)
        found, exact = zip(x, w, start, *options, out, strict=True)
        images.convolve(*found)
        generic_images.convolve(*exact)
        numbers.close(*out, 4)
    for start in (none, numbers.normal(image[-1]), x):
        out = numbers.empty(*image)
        found, exact = zip(g, w, start, *options, out, strict=True)
        images.convolve_input_gradient(*found)
        generic_images.convolve_input_gradient(*exact)
        numbers.close(*out, 4)
    out = numbers.empty(*filters)
    found, exact = zip(g, x, *options, out, strict=True)
    images.convolve_weight_gradient(*found)
    generic_images.convolve_weight_gradient(*exact)
    numbers.close(*out, 4)


@few
def test_maxima_of_windows(numbers: Numbers, cuda: Any) -> None:
    from hpcml.kernels.cuda import images

    values = numbers.normal(2, 7, 6, 5)[1]
    values[0, 1, 2, 3] = np.nan
    values[1, 2:4, 2:4] = 7  # equal ones
    x, g = numbers.pair(values), numbers.normal(2, 4, 6, 5)
    how = [(option, option) for option in ((3, 2), (2, 1), (1, 1), (1, 2))]
    out, back = numbers.empty(2, 4, 6, 5), numbers.empty(*x[1].shape)
    index = numbers.device.empty(g[1].shape, np.uint16), np.empty(g[1].shape, np.uint16)
    found, exact = zip(x, *how, out, index, strict=True)
    images.max_pool(*found)
    generic_images.max_pool(*exact)
    np.testing.assert_array_equal(host(out[0]).astype(float), out[1])
    np.testing.assert_array_equal(host(index[0]), index[1])
    found, exact = zip(g, index, *how, back, strict=True)
    images.max_pool_backward(*found)
    generic_images.max_pool_backward(*exact)
    numbers.close(*back, 2)


@few
@pytest.mark.parametrize(("rows", "channels"), [(1, 20), (300, 16), (150, 5)])
def test_batch_normalisation(rows: int, channels: int, numbers: Numbers, cuda: Any) -> None:
    from hpcml.kernels.cuda import images

    x, g, before = (numbers.normal(rows, channels, scale=s, shift=30 * (s == 1)) for s in (1, 2, 3))
    mean, scale, shift = (numbers.normal(channels, sums=True, scale=s) for s in (1, 2, 3))
    slopes = numbers.normal(2, channels, sums=True)
    moments = numbers.empty(channels, sums=True), numbers.empty(channels, sums=True)
    sums, out = numbers.empty(2, channels, sums=True), numbers.empty(rows, channels)
    for name, arguments in (
        ("batch_moments", (x, *moments)),
        ("batch_norm", (x, mean, scale, shift, out)),
        ("batch_norm_sums", (g, x, mean, sums)),
        ("batch_norm_backward", (g, x, mean, scale, slopes, before, out)),
        ("batch_norm_backward", (g, x, mean, scale, slopes, (before[0][:0], before[1][:0]), out)),
    ):
        found, exact = zip(*arguments, strict=True)
        getattr(images, name)(*found)
        getattr(generic_images, name)(*exact)
        for pair in (*moments, sums, out):
            if any(pair is argument for argument in arguments):
                numbers.close(*pair, 20 if name == "batch_moments" else 4)


@few
def test_resampling_and_transposing(numbers: Numbers, cuda: Any) -> None:
    from hpcml.kernels.cuda import images

    x = numbers.normal(3, 21, 40)
    first, count = np.array([0, 4, 20, 3]), np.array([2, 3, 1, 0])
    weights = np.random.default_rng(1).standard_normal((4, 3))
    out = numbers.empty(3, 4, 40)
    images.resample(x[0], first, count, weights, out[0])
    generic_images.resample(x[1], first, count, weights, out[1])
    numbers.close(*out, 2)
    out = numbers.empty(3, 40, 21)
    images.transpose(x[0], out[0])
    assert (host(out[0]).astype(float) == x[1].swapaxes(1, 2)).all()
