"""Layers that pool, resize and normalise images, with PyTorch's names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from hpcml.autograd import Tensor
from hpcml.autograd.ops.norm import Across
from hpcml.errors import UserError
from hpcml.nn import functional as F
from hpcml.nn.images import Size
from hpcml.nn.module import Module, where
from hpcml.nn.parameter import Constant, Parameter
from hpcml.nn.pools import adaptive_pooled, average_pooled, max_pooled, resized


class _MaxPool(Module):
    dims: ClassVar[int]

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        *,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *S')."""
        return max_pooled(
            where(self), self.dims, input, self.kernel_size, self.stride, self.padding,
            self.dilation, self.ceil_mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool1d(_MaxPool):
    """Maximum of windows of sequences."""

    dims = 1


class MaxPool2d(_MaxPool):
    """Maximum of windows of images."""

    dims = 2


class MaxPool3d(_MaxPool):
    """Maximum of windows of volumes."""

    dims = 3


class _AvgPool(Module):
    dims: ClassVar[int]

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *S')."""
        return average_pooled(
            where(self), self.dims, input, self.kernel_size, self.stride, self.padding,
            self.ceil_mode, self.count_include_pad,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool1d(_AvgPool):
    """Mean of windows of sequences."""

    dims = 1


class AvgPool2d(_AvgPool):
    """Mean of windows of images."""

    dims = 2


class AvgPool3d(_AvgPool):
    """Mean of windows of volumes."""

    dims = 3


class _AdaptiveAvgPool(Module):
    dims: ClassVar[int]

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *output_size)."""
        return adaptive_pooled(where(self), self.dims, input, self.output_size)

    def extra_repr(self) -> str:
        """Size."""
        return f"output_size={self.output_size}"


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Means of so many parts of sequences."""

    dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Means of so many parts of images; 1 for the mean of all, global pooling."""

    dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Means of so many parts of volumes."""

    dims = 3


class Upsample(Module):
    """Resize images to `size` or by `scale_factor`; see `functional.interpolate`."""

    def __init__(
        self,
        size: Size | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
    ) -> None:
        super().__init__()
        self.size, self.scale_factor = size, scale_factor
        self.mode, self.align_corners = mode, align_corners

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *S')."""
        return resized(
            where(self), input, self.size, self.scale_factor, self.mode, self.align_corners
        )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"size={self.size}, scale_factor={self.scale_factor}, mode={self.mode}"


class PixelShuffle(Module):
    """All pixels of each place side by side: (N, C * factor^d, *S) -> (N, C, factor * S).

    Channel c of pixel (i, j) of a place is its channel c * factor^2 + i * factor + j (Shi et al.
    2016, "Real-time single image and video super-resolution"). In one to three dimensions. size:
    what is beyond at the end is cut off.
    """

    def __init__(self, upscale_factor: int, size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor
        self.size = None if size is None else tuple(size)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C * factor^d, *S) -> (N, C, *size)."""
        out = self.shuffle(input)
        return out if self.size is None else out[(slice(None), slice(None), *map(slice, self.size))]

    def shuffle(self, input: Tensor) -> Tensor:
        """The same without a cut."""
        n, channels, *places = input.shape
        d, f = len(places), self.upscale_factor
        if channels % f**d:
            raise UserError(
                f"{where(self)}: {channels} channels are not {f}^{d} for each of the result"
            )
        x = input.reshape(n, channels // f**d, *[f] * d, *places)
        x = x.permute(0, 1, *(axis for dim in range(d) for axis in (2 + d + dim, 2 + dim)))
        return x.reshape(n, channels // f**d, *(f * m for m in places))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"upscale_factor={self.upscale_factor}, size={self.size}"


class _BatchNorm(Module):
    ndims: ClassVar[tuple[int, ...]]

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    across: Across | None = None
    """How statistics come of those of parts, where ranks have parts of a sample."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise UserError(f"{type(self).__name__}: num_features={num_features} must be positive")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        shape = (num_features,)
        self.weight = Parameter(shape=shape, init=Constant(1.0)) if affine else None
        self.bias = Parameter(shape=shape, init=Constant(0.0)) if affine else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.register_buffer("running_mean", Tensor(np.zeros(shape, np.float32)))
            self.register_buffer("running_var", Tensor(np.ones(shape, np.float32)))
            self.register_buffer("num_batches_tracked", Tensor(np.zeros((), np.int64)))

    def forward(self, input: Tensor) -> Tensor:
        """Same shape; in training the running estimates move."""
        if input.ndim not in self.ndims or input.shape[1] != self.num_features:
            channels, some = sum(input.shape[1:2]), " or ".join(map(str, self.ndims))
            raise UserError(  # without sizes, of which ranks may have parts
                f"{where(self)}: {channels} channels in {input.ndim} dimensions came, and it takes "
                f"{self.num_features} in {some}"
            )
        if self.training and self.across is None and input.numel() == self.num_features:
            raise UserError(
                f"{where(self)}: {input.shape} has one value a channel, which makes no statistics: "
                "train with more samples at once, or larger images"
            )
        momentum, tracked = self.momentum, self.num_batches_tracked
        if self.training and tracked is not None:
            tracked.data[...] += 1
            if momentum is None:  # the mean of all so far
                momentum = 1 / int(tracked)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or tracked is None, momentum or 0.0, self.eps, across=self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class BatchNorm1d(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, L) (Ioffe and Szegedy 2015).

    In training by the mean and variance of each channel in the batch at hand, a microbatch; in
    evaluation by running estimates, buffers that training moves: r to (1 - momentum) r + momentum *
    statistic, or with momentum None to the mean of all so far.
    """

    ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalisation of (N, C, H, W); see `BatchNorm1d`."""

    ndims = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalisation of (N, C, D, H, W); see `BatchNorm1d`."""

    ndims = (5,)
