"""Functions of images and other regular grids, under PyTorch's names and argument orders.

Images are (N, C, *S) with one to three spatial dimensions; results lie in memory channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.ops import images, norm, shape
from hpcml.autograd.ops.norm import Across
from hpcml.errors import UserError

Size = int | tuple[int, ...]
"""A number for all spatial dimensions, or one for each."""

Padding = Size | str | tuple[tuple[int, int], ...]
"""On both sides, or "valid" (none), or "same"; or (before, after) for each dimension."""


def sizes(where: str, what: str, value: Any, dims: int, least: int = 1) -> tuple[int, ...]:
    """A number for each of `dims` spatial dimensions; raises UserError for what is none."""
    many = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
    if len(many) != dims or any(not isinstance(n, int) or n < least for n in many):
        raise UserError(
            f"{where}: {what}={value}: give a number of at least {least}, or {dims} of them"
        )
    return many


def check_image(where: str, input: Tensor, dims: int) -> None:
    """Raise UserError unless this is a batch of images of so many dimensions.

    In words that are the same wherever ranks have parts of images: without their sizes.
    """
    if input.ndim != dims + 2:
        shape = ", ".join(("N", "C", *"DHW"[3 - dims :]))
        raise UserError(f"{where}: {input.ndim} dimensions came, and it takes ({shape})")


def plan(
    where: str, kernel: tuple[int, ...], stride: Size, padding: Padding, dilation: Size
) -> dict[str, Any]:
    """Stride, padding before and after, and dilation along each dimension."""
    dims = len(kernel)
    strides, dilations = (
        sizes(where, what, n, dims) for what, n in (("stride", stride), ("dilation", dilation))
    )
    if padding == "same":
        if strides != (1,) * dims:
            raise UserError(f'{where}: padding="same" needs stride 1, not {stride}: give numbers')
        total = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        pairs = tuple((n // 2, n - n // 2) for n in total)
    elif isinstance(padding, tuple) and any(isinstance(n, tuple) for n in padding):
        pairs = tuple(n for n in padding if isinstance(n, tuple))
    else:
        each = sizes(where, "padding", 0 if padding == "valid" else padding, dims, 0)
        pairs = tuple((n, n) for n in each)
    return {"stride": strides, "padding": pairs, "dilation": dilations}


def check_padding(where: str, mode: str, shape: tuple[int, ...], widths: Any) -> None:
    """Raise UserError where there is less than its mode continues it by."""
    for n, pair in zip(shape, widths, strict=True):
        if pair == (0, 0):  # of a batch without samples nothing is asked
            continue
        most = {"reflect": n - 1, "circular": n}.get(mode, max(pair) if n else 0)
        if max(pair) > most or min(pair) < 0:
            raise UserError(
                f'{where}: padding {pair} about {n} of {shape}: mode="{mode}" takes 0 to {most}'
            )


def window_sizes(
    where: str, shape: tuple[int, ...], kernel: tuple[int, ...], how: Any, mode: str = "zeros"
) -> Any:
    """Sizes of the output of filters; raises UserError where these do not fit, or padding."""
    if mode != "zeros":
        check_padding(where, mode, shape, how["padding"])
    found = images.out_sizes(shape, kernel, **how)
    if min(found, default=1) < 1:
        raise UserError(
            f"{where}: a window of {kernel} with dilation {how['dilation']} does not fit into an "
            f"image of {shape} with padding {how['padding']}: pad more, or take a larger image"
        )
    return found


def convolve(
    where: str, input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Size, padding: Padding, dilation: Size, groups: int, winograd: bool = False,
    mode: str = "zeros",
) -> Tensor:  # fmt: skip
    """`conv1d` to `conv3d` for whom errors name: a function or a layer; see `nn.use_winograd`.

    mode: of the padding.
    """
    check_filters(where, input, weight, bias, groups)
    kernel = weight.shape[2:]
    how = plan(where, kernel, stride, padding, dilation)
    window_sizes(where, input.shape[2:], kernel, how, mode)
    if mode != "zeros" and any(map(any, how["padding"])):
        input = shape.pad(input, widths=((0, 0), (0, 0), *how["padding"]), mode=mode)
        how["padding"] = ((0, 0),) * len(kernel)
    return images.convolution(input, weight, bias, **how, groups=groups, winograd=winograd)


def check_filters(
    where: str, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> None:
    """Raise UserError unless these go together."""
    check_image(where, input, weight.ndim - 2)
    filters, channels = weight.shape[:2]
    if groups < 1 or filters % groups or input.shape[1] != channels * groups:
        raise UserError(
            f"{where}: {input.shape[1]} channels came, weight {weight.shape}, groups={groups}: it "
            f"takes {channels} * groups channels, and groups divide {filters} filters"
        )
    _check_bias(where, bias, filters)


def _check_bias(where: str, bias: Tensor | None, filters: int) -> None:
    if bias is not None and bias.shape != (filters,):
        raise UserError(f"{where}: bias {bias.shape} must be ({filters},)")


def transposed_sizes(
    where: str, shape: tuple[int, ...], kernel: tuple[int, ...], how: dict[str, Any],
    output_padding: Size,
) -> tuple[int, ...]:  # fmt: skip
    """Sizes of the output of a transposed convolution; raises UserError where there is none."""
    extra = sizes(where, "output_padding", output_padding, len(shape), 0)
    before = tuple(a for a, _ in how["padding"])
    every = zip(shape, kernel, extra, how["stride"], before, how["dilation"], strict=True)
    found = []
    for n, k, e, s, b, d in every:
        if e >= max(s, d):
            raise UserError(
                f"{where}: output_padding={output_padding} must be below stride or dilation"
            )
        found.append((n - 1) * s - 2 * b + (k - 1) * d + 1 + e)
    if min(found) < 1:
        raise UserError(f"{where}: padding={before} leaves nothing of an image {shape}")
    return tuple(found)


def check_transposed(
    where: str, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> None:
    """Raise UserError unless these go together."""
    check_image(where, input, weight.ndim - 2)
    channels, filters = weight.shape[:2]
    if groups < 1 or channels % groups or input.shape[1] != channels:
        raise UserError(
            f"{where}: {input.shape[1]} channels came, weight {weight.shape}, groups={groups}: it "
            f"takes {channels} channels, of which groups is a divisor"
        )
    _check_bias(where, bias, filters * groups)


def convolve_transposed(
    where: str, input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Size, padding: Size, output_padding: Size, groups: int, dilation: Size,
) -> Tensor:  # fmt: skip
    """`conv_transpose1d` to `conv_transpose3d` for whom errors name."""
    check_transposed(where, input, weight, bias, groups)
    kernel = weight.shape[2:]
    how = plan(where, kernel, stride, padding, dilation)
    found = transposed_sizes(where, input.shape[2:], kernel, how, output_padding)
    before = tuple(a for a, _ in how.pop("padding"))
    return images.transposed_convolution(
        input, weight, bias, sizes=found, before=before, **how, groups=groups
    )


def called(function: Callable[..., Tensor], name: str) -> Any:
    """A function by the name it has in PyTorch."""
    function.__name__ = function.__qualname__ = name
    return function


def _conv(dims: int) -> Any:
    def conv(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        """Cross-correlation: (N, C, *S) with weight (F, C / groups, *K) -> (N, F, *S').

        padding: on both sides, or "valid" (none), or "same" (as many outputs as inputs; of an odd
        number the larger part behind). Raises UserError for sizes that do not fit.
        """
        where = f"conv{dims}d({input.shape})"  # a layer has a name instead, alike on all ranks
        return convolve(where, input, weight, bias, stride, padding, dilation, groups)

    return called(conv, f"conv{dims}d")


conv1d, conv2d, conv3d = (_conv(dims) for dims in (1, 2, 3))


def _conv_transpose(dims: int) -> Any:
    def conv(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1,
        padding: Size = 0, output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
    ) -> Tensor:  # fmt: skip
        """The adjoint of a convolution: (N, C, *S) with weight (C, F / groups, *K) -> (N, F, *S').

        output_padding: places by which the result is larger behind than it must be. Raises
        UserError for sizes that do not fit.
        """
        where = f"conv_transpose{dims}d({input.shape})"
        return convolve_transposed(
            where, input, weight, bias, stride, padding, output_padding, groups, dilation
        )

    return called(conv, f"conv_transpose{dims}d")


conv_transpose1d, conv_transpose2d, conv_transpose3d = (_conv_transpose(d) for d in (1, 2, 3))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    across: Across | None = None,
) -> Tensor:
    """Normalise each channel of (N, C, *S) (Ioffe and Szegedy 2015).

    training: by the statistics of `input`, which also move the running ones, if given: r to (1 -
    momentum) r + momentum * statistic. Otherwise by the running ones. across: `input` is a part of
    what these statistics are of.
    """
    if input.ndim < 2:
        raise UserError(f"batch_norm: input {input.shape} must be (N, C, ...)")
    channels = input.shape[1]
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight,
             "bias": bias}  # fmt: skip
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != (channels,):
            raise UserError(f"batch_norm: {name} {tensor.shape} for an input {input.shape}")
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        raise UserError("batch_norm: give running_mean and running_var, or train without both")
    if training and across is None and input.numel() == channels:
        raise UserError(f"batch_norm: {input.shape} has one value a channel: train with more")
    running = None
    if running_mean is not None and running_var is not None:
        running = running_mean.data, running_var.data
    return norm.batch_norm(
        input,
        weight,
        bias,
        running=running,
        training=training,
        momentum=momentum,
        eps=eps,
        across=across,
    )
