"""Layers of convolutions, with PyTorch's names, signatures, weight shapes and first values."""

from __future__ import annotations

import math
from typing import ClassVar

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn.images import Size, convolve, convolve_transposed, sizes
from hpcml.nn.module import Module, where
from hpcml.nn.parameter import Parameter, Uniform

_MODES = "zeros", "reflect", "replicate", "circular"


class _Convolution(Module):
    """What convolutions and transposed ones have in common: sizes and parameters."""

    dims: ClassVar[int]

    def _make(
        self, channels: int, filters: int, kernel: Size, stride: Size, dilation: Size,
        groups: int, transposed: bool, bias: bool, padding_mode: str,
    ) -> None:  # fmt: skip
        layer = type(self).__name__
        if min(channels, filters, groups) < 1 or channels % groups or filters % groups:
            raise UserError(
                f"{layer}: in_channels={channels} and out_channels={filters} must be positive "
                f"multiples of groups={groups}"
            )
        if padding_mode not in _MODES:
            names = ", ".join(_MODES)
            raise UserError(f'{layer}: padding_mode="{padding_mode}": use one of {names}')
        self.in_channels, self.out_channels, self.groups = channels, filters, groups
        self.kernel_size = sizes(layer, "kernel_size", kernel, self.dims)
        self.stride = sizes(layer, "stride", stride, self.dims)
        self.dilation = sizes(layer, "dilation", dilation, self.dims)
        self.padding_mode = padding_mode
        outer, inner = (channels, filters) if transposed else (filters, channels)
        shape = (outer, inner // groups, *self.kernel_size)
        first = Uniform(1 / math.sqrt(math.prod(shape[1:])))
        self.weight = Parameter(shape=shape, init=first)
        self.bias = Parameter(shape=(filters,), init=first) if bias else None

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


class _Conv(_Convolution):
    winograd = False
    """See `use_winograd`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self._make(in_channels, out_channels, kernel_size, stride, dilation, groups, False, bias,
                   padding_mode)  # fmt: skip
        layer = type(self).__name__
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise UserError(f'{layer}: padding="{padding}": use numbers, "same" or "valid"')
            self.padding: Size | str = padding
        else:
            self.padding = sizes(layer, "padding", padding, self.dims, 0)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, F, *S')."""
        return convolve(
            where(self), input, self.weight, self.bias, self.stride, self.padding, self.dilation,
            self.groups, self.winograd, self.padding_mode,
        )  # fmt: skip


class Conv1d(_Conv):
    """Cross-correlation of sequences: (N, C, L) -> (N, F, L').

    First values uniform on +-1/sqrt(C / groups * K), as in PyTorch (He et al. 2015, a = sqrt 5).
    """

    dims = 1


class Conv2d(_Conv):
    """Cross-correlation of images: (N, C, H, W) -> (N, F, H', W'); see `Conv1d`."""

    dims = 2


def use_winograd(model: Module) -> None:
    """Let a model compute convolutions by Winograd's method where that is faster.

    Those of `Conv2d`, 3 x 3 with stride 1, of 16 channels and filters or more, and their gradients
    (Lavin and Gray 2016, F(4 x 4, 3 x 3)): a quarter of the multiplications, and twice the rounding
    errors. On one rank an image's results do not depend on the others in a batch. Layers of which
    ranks have blocks of images do not take it: where blocks end would change the bits.
    """
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.winograd = True


class Conv3d(_Conv):
    """Cross-correlation of volumes: (N, C, D, H, W) -> (N, F, D', H', W'); see `Conv1d`."""

    dims = 3


class _ConvTranspose(_Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self._make(in_channels, out_channels, kernel_size, stride, dilation, groups, True, bias,
                   padding_mode)  # fmt: skip
        layer = type(self).__name__
        if padding_mode != "zeros":
            raise UserError(f'{layer}: padding_mode="{padding_mode}": only "zeros" is defined')
        self.padding = sizes(layer, "padding", padding, self.dims, 0)
        self.output_padding = sizes(layer, "output_padding", output_padding, self.dims, 0)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, F, *S')."""
        return convolve_transposed(
            where(self), input, self.weight, self.bias, self.stride, self.padding,
            self.output_padding, self.groups, self.dilation,
        )  # fmt: skip


class ConvTranspose1d(_ConvTranspose):
    """The adjoint of a convolution of sequences: (N, C, L) -> (N, F, L').

    First values uniform on +-1/sqrt(F / groups * K), as in PyTorch.
    """

    dims = 1


class ConvTranspose2d(_ConvTranspose):
    """The adjoint of a convolution of images; see `ConvTranspose1d`."""

    dims = 2


class ConvTranspose3d(_ConvTranspose):
    """The adjoint of a convolution of volumes; see `ConvTranspose1d`."""

    dims = 3
