"""Pooling and interpolation of images, under PyTorch's names and argument orders."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.autograd.ops import pooling
from hpcml.autograd.ops.pooling import Band
from hpcml.errors import UserError
from hpcml.nn.images import Size, called, check_image, sizes

_LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
_MOST_TAPS = 1 << 16  # their numbers are kept in 16 bits


def windows(
    where: str, shape: tuple[int, ...], kernel: Size, stride: Any, padding: Size, dilation: Size,
    ceil_mode: bool,
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """Sizes of the output, window, strides, padding and dilation along each dimension."""
    dims = len(shape)
    size = sizes(where, "kernel_size", kernel, dims)
    strides = size if stride is None else sizes(where, "stride", stride, dims)
    before = sizes(where, "padding", padding, dims, 0)
    dilations = sizes(where, "dilation", dilation, dims)
    found = []
    every = zip(shape, size, strides, before, dilations, strict=True)
    for n, k, s, p, d in every:
        reach = (k - 1) * d + 1
        if 2 * p > reach:
            raise UserError(f"{where}: padding={padding} is more than half of a window of {reach}")
        rest = n + 2 * p - reach
        count = (-(-rest // s) if ceil_mode else rest // s) + 1
        if count < 1:
            raise UserError(
                f"{where}: a window of {size} with dilation {dilations} does not fit into an image "
                f"of {shape} with padding {before}: pad more, or take a larger image"
            )
        found.append(count - ((count - 1) * s >= n + p))  # each begins before what is behind
    return tuple(found), size, strides, before, dilations


def max_windows(
    where: str, shape: tuple[int, ...], kernel: Size, *how: Any
) -> tuple[tuple[int, ...], ...]:
    """`windows` of which the maximum can be taken."""
    found = windows(where, shape, kernel, *how)
    if math.prod(found[1]) > _MOST_TAPS:
        raise UserError(f"{where}: kernel_size={kernel}: at most {_MOST_TAPS} elements")
    return found


def max_pooled(
    where: str, dims: int, input: Tensor, kernel_size: Size, stride: Size | None, padding: Size,
    dilation: Size, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """`max_pool1d` to `max_pool3d` for whom errors name: a function or a layer."""
    check_image(where, input, dims)
    found, size, strides, before, dilations = max_windows(
        where, input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode
    )
    return pooling.max_pool(
        input, sizes=found, kernel=size, stride=strides, before=before, dilation=dilations
    )


def _max_pool(dims: int) -> Any:
    def max_pool(
        input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
        dilation: Size = 1, ceil_mode: bool = False,
    ) -> Tensor:  # fmt: skip
        """Maximum of windows: (N, C, *S) -> (N, C, *S'); the first of equal ones has the gradient.

        stride: that of the window by default. ceil_mode: also windows that reach beyond the end.
        Raises UserError for sizes that do not fit.
        """
        return max_pooled(
            f"max_pool{dims}d", dims, input, kernel_size, stride, padding, dilation, ceil_mode
        )

    return called(max_pool, f"max_pool{dims}d")


max_pool1d, max_pool2d, max_pool3d = (_max_pool(dims) for dims in (1, 2, 3))


@functools.lru_cache
def _means(n: int, m: int, size: int, stride: int, padding: int, counted: bool) -> Band:
    """Means of m windows over n elements; counted: elements of the padding too."""
    rows = []
    for j in range(m):
        start = j * stride - padding
        end = min(start + size, n + padding)
        low, high = max(start, 0), min(end, n)
        rows.append((low, [1 / (end - start if counted else high - low)] * (high - low)))
    return Band.of(rows)


def average_bands(
    where: str, shape: tuple[int, ...], kernel_size: Size, stride: Size | None, padding: Size,
    ceil_mode: bool, count_include_pad: bool,
) -> tuple[Band, ...]:  # fmt: skip
    """Means of windows, as a matrix for each dimension."""
    found, size, strides, before, _ = windows(
        where, shape, kernel_size, stride, padding, 1, ceil_mode
    )
    every = zip(shape, found, size, strides, before, strict=True)
    return tuple(_means(*each, count_include_pad) for each in every)


def average_pooled(where: str, dims: int, input: Tensor, *how: Any) -> Tensor:
    """`avg_pool1d` to `avg_pool3d` for whom errors name."""
    check_image(where, input, dims)
    return pooling.resample(input, bands=average_bands(where, input.shape[2:], *how))


def _avg_pool(dims: int) -> Any:
    def avg_pool(
        input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
        ceil_mode: bool = False, count_include_pad: bool = True,
    ) -> Tensor:  # fmt: skip
        """Mean of windows: (N, C, *S) -> (N, C, *S').

        stride: that of the window by default. ceil_mode: also windows that reach beyond the end.
        count_include_pad: padding counts as zeros. Raises UserError for sizes that do not fit.
        """
        return average_pooled(
            f"avg_pool{dims}d", dims, input, kernel_size, stride, padding, ceil_mode,
            count_include_pad,
        )  # fmt: skip

    return called(avg_pool, f"avg_pool{dims}d")


avg_pool1d, avg_pool2d, avg_pool3d = (_avg_pool(dims) for dims in (1, 2, 3))


@functools.lru_cache
def _parts(n: int, m: int) -> Band:
    """Means of m parts of n elements, as equal as can be; they overlap where m does not divide."""
    ends = [(j * n // m, -(-(j + 1) * n // m)) for j in range(m)]
    return Band.of([(a, [1 / (b - a)] * (b - a)) for a, b in ends])


def adaptive_bands(where: str, shape: tuple[int, ...], output_size: Any) -> tuple[Band | None, ...]:
    """Means of parts, as a matrix for each dimension; None for one that stays as it is."""
    asked = output_size if isinstance(output_size, tuple | list) else (output_size,) * len(shape)
    wanted = [n if m is None else m for n, m in zip(shape, asked, strict=False)]
    found = sizes(where, "output_size", (*wanted, *asked[len(wanted) :]), len(shape))
    return tuple(None if n == m else _parts(n, m) for n, m in zip(shape, found, strict=True))


def adaptive_pooled(where: str, dims: int, input: Tensor, output_size: Any) -> Tensor:
    """`adaptive_avg_pool1d` to `adaptive_avg_pool3d` for whom errors name."""
    check_image(where, input, dims)
    return pooling.resample(input, bands=adaptive_bands(where, input.shape[2:], output_size))


def _adaptive_avg_pool(dims: int) -> Any:
    def adaptive_avg_pool(input: Tensor, output_size: Any) -> Tensor:
        """Means of as many parts as `output_size` says: (N, C, *S) -> (N, C, *output_size).

        A number for all dimensions, or one for each; None leaves a dimension as it is.
        """
        return adaptive_pooled(f"adaptive_avg_pool{dims}d", dims, input, output_size)

    return called(adaptive_avg_pool, f"adaptive_avg_pool{dims}d")


adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = (
    _adaptive_avg_pool(dims) for dims in (1, 2, 3)
)


@functools.lru_cache
def _nearest(n: int, m: int, scale: float) -> Band:
    """The element at or before each place, computed in float32 as PyTorch does."""
    places = np.floor(np.arange(m, dtype=np.float32) * np.float32(scale)).astype(int)
    return Band.of([(min(int(i), n - 1), [1.0]) for i in places])


@functools.lru_cache
def _linear(n: int, m: int, scale: float, align_corners: bool) -> Band:
    """Linear interpolation between neighbours; the outermost element goes on beyond the edge."""
    rows: list[tuple[int, list[float]]] = []
    for j in range(m):
        place = j * scale if align_corners else max((j + 0.5) * scale - 0.5, 0)
        low = min(int(place), n - 1)
        rest = place - low
        rows.append((low, [1 - rest, rest] if low + 1 < n else [1.0]))
    return Band.of(rows)


def interpolate(
    input: Tensor,
    size: Size | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """Resize images: (N, C, *S) to `size`, or to floor(S * scale_factor).

    mode: "nearest", or "linear", "bilinear", "trilinear" by the number of dimensions; of those
    `align_corners` says that the centres of the outermost elements stay where they are, instead of
    the edges. Raises UserError for what does not fit.
    """
    return resized("interpolate", input, size, scale_factor, mode, align_corners)


def resized(where: str, input: Tensor, *how: Any) -> Tensor:
    """`interpolate` for whom errors name."""
    return pooling.resample(input, bands=resize_bands(where, input.shape[2:], *how))


def resize_bands(
    where: str, shape: tuple[int, ...], size: Size | None,
    scale_factor: float | tuple[float, ...] | None, mode: str, align_corners: bool | None,
) -> tuple[Band, ...]:  # fmt: skip
    """Interpolation, as a matrix for each dimension; see `interpolate`."""
    dims = len(shape)
    if (size is None) == (scale_factor is None):
        raise UserError(f"{where}: give either size={size} or scale_factor={scale_factor}")
    if mode != "nearest" and _LINEAR.get(mode) != dims:
        names = ", ".join(["nearest", *(name for name, d in _LINEAR.items() if d == dims)])
        raise UserError(f'{where}: mode="{mode}" for images of {shape}: use one of {names}')
    if align_corners is not None and mode == "nearest":
        raise UserError(f"{where}: align_corners={align_corners} is for linear modes: leave it out")
    factors: tuple[float, ...] = ()
    if scale_factor is not None:
        factors = scale_factor if isinstance(scale_factor, tuple) else (scale_factor,) * dims
        size = tuple(int(n * f) for n, f in zip(shape, factors, strict=True))
    found = sizes(where, "size", size, dims)
    bands = []
    for dim, (n, m) in enumerate(zip(shape, found, strict=True)):
        scale = 1 / factors[dim] if factors else n / m
        if mode == "nearest":
            bands.append(_nearest(n, m, scale))
        elif align_corners:
            bands.append(_linear(n, m, (n - 1) / (m - 1) if m > 1 else 0.0, True))
        else:
            bands.append(_linear(n, m, scale, False))
    return tuple(bands)
