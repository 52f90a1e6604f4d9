"""The compiled kernels for images against array expressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import backend, kernels
from hpcml.kernels import generic_images as plain
from hpcml.kernels.cpu import team
from tests.kernels.support import DTYPES, bits, close, randoms

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = [
    ((2, 7, 4), (6, 4, 3), ((2,), (1,), (1,), 1)),
    ((1, 9, 8, 40), (33, 40, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((2, 9, 8, 6), (8, 3, 3, 2), ((2, 1), (1, 0), (2, 3), 2)),
    ((3, 5, 6, 64), (65, 64, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((1, 3, 4, 390), (520, 390, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((2, 15, 5, 3), (20, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    ((1, 4, 5, 6, 2), (3, 2, 2, 3, 3), ((1, 2, 1), (1, 1, 0), (1, 1, 2), 1)),
]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("image", "filters", "how"), CONVOLUTIONS)
def test_convolution(image: Any, filters: Any, how: Any, dtype: str) -> None:
    stride, before, dilation, _ = how
    every = zip(image[1:-1], filters[2:], stride, before, dilation, strict=True)
    sizes = [(n + 2 * b - (k - 1) * d - 1) // s + 1 for n, k, s, b, d in every]
    x, w, g, bias = randoms(dtype, image, filters, (image[0], *sizes, filters[0]), filters[:1])
    fast = kernels.images(x)
    assert fast is not plain
    both: list[list[Any]] = []
    for k in (fast, plain):
        out, to_x, to_w = np.empty_like(g), np.empty_like(x), np.empty_like(w)
        k.convolve(x, w, bias, *how, out)
        k.convolve_input_gradient(g, w, x, *how, to_x)
        k.convolve_weight_gradient(g, x, *how, to_w)
        both.append([out, to_x, to_w])
    for ours, expected in zip(*both, strict=True):
        close(ours, expected, dtype, 5)


@pytest.mark.parametrize(
    ("image", "filters", "padding"),
    [
        ((5, 8, 8, 16), 32, 1),
        ((1, 9, 7, 20), 33, 1),
        ((3, 5, 6, 64), 65, 0),
        ((1, 4, 3, 100), 40, 2),
        ((0, 4, 4, 16), 16, 1),
    ],
)
def test_winograd(
    image: Any, filters: int, padding: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles than filters and fewer, tiles beyond the edge; each image has bits of its own."""
    n, height, width, channels = image
    out = (n, height + 2 * padding - 2, width + 2 * padding - 2, filters)
    x, g, w = randoms(dtype, image, out, (filters, channels, 3, 3))
    bias, *_ = randoms(dtype, (filters,))
    how = (1, 1), (padding,) * 2, (1, 1), 1
    monkeypatch.setattr(team, "LEAST", 1)

    def results(k: Any, threads: int = 1, some: Any = slice(None)) -> list[Any]:
        monkeypatch.setattr(backend, "_threads", threads)
        made = np.empty_like(g[some]), np.empty_like(x[some]), np.empty_like(w)
        k.convolve(x[some], w, bias, *how, made[0])
        k.convolve_input_gradient(g[some], w, x[some], *how, made[1])
        k.convolve_weight_gradient(g[some], x[some], *how, made[2])
        return list(made)

    fast = kernels.convolutions(x, winograd=True)
    ours = results(fast)
    for one, expected in zip(ours, results(plain), strict=True):
        close(one, expected, dtype, 5)
    direct = results(kernels.convolutions(x))
    assert not n or all(bits(a) != bits(b) for a, b in zip(ours, direct, strict=True))
    assert bits(*ours) == bits(*results(fast, threads=2))
    assert bits(*(one[:1] for one in ours[:2])) == bits(*results(fast, 1, slice(1))[:2])


def test_maxima_of_windows(dtype: str) -> None:
    (x,) = randoms(dtype, (2, 7, 6, 5))
    x[0, 1, 2, 3] = np.nan
    how = (3, 2), (2, 1), (1, 1), (1, 2)
    results: list[list[Any]] = []
    for k in (kernels.images(x), plain):
        out, index = np.empty((2, 4, 6, 5), dtype), np.empty((2, 4, 6, 5), np.uint16)
        k.max_pool(x, *how, out, index)
        back = np.empty_like(x)
        k.max_pool_backward(*randoms(dtype, out.shape), index, *how, back)
        results.append([out, index, back])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 300])
def test_batch_normalisation(rows: int, dtype: str) -> None:
    x, g, pending = randoms(dtype, *[(rows, 20)] * 3)
    mean, scale, shift = randoms(dtype, *[(20,)] * 3)
    (slopes,) = randoms(dtype, (2, 20))
    results: list[list[Any]] = []
    for k in (kernels.images(x), plain):
        a, b, sums = np.empty(20, dtype), np.empty(20, dtype), np.empty((2, 20), dtype)
        out, to_x, alone = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        k.batch_moments(x, a, b)
        k.batch_norm(x, mean, scale, shift, out)
        k.batch_norm_sums(g, x, mean, sums)
        k.batch_norm_backward(g, x, mean, scale, slopes, pending, to_x)
        k.batch_norm_backward(g, x, mean, scale, slopes, pending[:0], alone)
        results.append([a, b, sums, out, to_x, alone])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, dtype, 5)


def test_moments_of_numbers_far_from_zero(dtype: str) -> None:
    """Sums of squares would leave nothing of the variance."""
    (x,) = randoms(dtype, (5000, 3))
    far = x + x.dtype.type(1e4)
    mean, variance = np.empty(3, dtype), np.empty(3, dtype)
    kernels.images(x).batch_moments(far, mean, variance)
    np.testing.assert_allclose(mean, far.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, far.astype(np.float64).var(0), rtol=1e-3)


def test_resampling_and_transposing(dtype: str) -> None:
    (x,) = randoms(dtype, (3, 21, 18))
    first, count = np.array([0, 4, 20, 3]), np.array([2, 3, 1, 0])
    (weights,) = randoms(dtype, (4, 3))
    for name, args, shape in (
        ("resample", (first, count, weights), (3, 4, 18)), ("transpose", (), (3, 18, 21)),
    ):  # fmt: skip
        results = []
        for k in (kernels.images(x), plain):
            results.append(np.empty(shape, dtype))
            getattr(k, name)(x, *args, results[-1])
        close(*results, dtype)
