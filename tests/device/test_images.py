"""Products, convolutions and what images need on a GPU, run on the CPU, against specifications."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.kernels import generic, generic_images
from tests.device.support import Numbers, few, host


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
    ((1, 3, 5, 4, 2), (3, 2, 2, 3, 3), ((1, 2, 1), (1, 1, 1), (1, 1, 2), 1)),
    ((1, 3, 3, 1), (1, 1, 1, 1), ((2, 2), (0, 0), (1, 1), 1)),  # fewer columns than a pack has
]


@few
@pytest.mark.parametrize(("image", "filters", "how"), CONVOLUTIONS)
def test_convolution(
    image: Any, filters: Any, how: Any, numbers: Numbers, cuda: Any, monkeypatch: Any
) -> None:
    from hpcml.kernels.cuda import images

    monkeypatch.setattr(images, "_COLUMNS", 1)  # a sample at once
    convolved(image, filters, how, numbers)


def convolved(image: Any, filters: Any, how: Any, numbers: Numbers) -> None:
    """Hold the three passes of a convolution against their specification."""
    from hpcml.kernels.cuda import images

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
    x, out = numbers.normal(3, 40, 70), numbers.empty(3, 70, 40)
    images.transpose(x[0], out[0])
    assert (host(out[0]).astype(float) == x[1].swapaxes(1, 2)).all()
