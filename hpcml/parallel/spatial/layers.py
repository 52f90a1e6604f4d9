"""Layers on blocks of images: each gets what its block of the output reads, and computes that.

A rank calls the serial operation on what it reads. Where the image ends, the serial operation pads;
where only the block ends, ghosts are there (Dryden et al. 2019, "Improving strong-scaling of CNN
training by exploiting finer-grained parallelism", section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.ops import fused, images, pooling
from hpcml.autograd.ops.pooling import Band
from hpcml.errors import UserError
from hpcml.nn import functional as F
from hpcml.nn.images import (
    check_image,
    check_transposed,
    convolve,
    plan,
    transposed_sizes,
    window_sizes,
)
from hpcml.nn.part import Range
from hpcml.nn.pools import adaptive_bands, average_bands, max_windows, resize_bands
from hpcml.parallel.spatial.exchange import Exchange
from hpcml.parallel.spatial.geometry import Window, mirrored, rows, within
from hpcml.parallel.spatial.grid import Grid, Sizes, where

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Local:
    """What a rank does for its block of a layer's output."""

    exchange: Exchange
    sizes: Sizes = ()
    """Of the block of the output."""
    pads: tuple[Range, ...] = ()
    """Before and after what is read, where that ends with the image."""
    bands: tuple[Band | None, ...] = ()


def _planned(grid: Grid, module: Any, x: Tensor, make: Callable[[Sizes], Any]) -> Any:
    check_image(where(module), x, len(grid.whole))
    sizes = grid.sizes(module, x)
    return grid.plan((id(module), sizes), lambda: make(sizes))


def _windowed(
    grid: Grid, module: Any, sizes: Sizes, found: Sizes, windows: Sequence[Window], mode: str
) -> Local:
    """For windows over an image of `sizes`, of which there are `found`."""
    grid.require(where(module), "outputs", found)
    outputs = grid.ranges(found)
    wanted = [[w.reads(o) for o in of_ranks] for w, of_ranks in zip(windows, outputs, strict=True)]
    if mode == "circular":
        reads = tuple(map(tuple, wanted))
    elif mode == "zeros":
        reads = tuple(
            tuple(within(one, n) for one in ranges) for ranges, n in zip(wanted, sizes, strict=True)
        )
    else:
        reads = tuple(
            tuple(mirrored(one, n, mode) for one in ranges)
            for ranges, n in zip(wanted, sizes, strict=True)
        )
    exchange = grid.exchange(sizes, reads, periodic=mode == "circular")
    pads = tuple(
        (got[0] - want[0], want[1] - got[1])
        for got, want in zip(grid.mine(reads), grid.mine(wanted), strict=True)
    )
    if any(got[0] < want[0] for some, all_ in zip(reads, wanted, strict=True)
           for got, want in zip(some, all_, strict=True)) and mode == "zeros":  # fmt: skip
        raise UserError(
            f"{where(module)}: windows that lie in the padding altogether cannot be divided: pad "
            "less than a window reaches"
        )
    own = tuple(end - first for first, end in grid.mine(outputs))
    return Local(exchange, own, pads)


def windows_of(module: Any, grid: Grid, sizes: Sizes) -> Local:
    """What a rank does for its block of a convolution of images of these sizes."""
    kernel, place = module.kernel_size, where(module)
    how = plan(place, kernel, module.stride, module.padding, module.dilation)
    windows = [
        Window(k, s, before, d)
        for k, s, (before, _), d in zip(
            kernel, how["stride"], how["padding"], how["dilation"], strict=True
        )
    ]
    found = window_sizes(place, sizes, kernel, how)
    return _windowed(grid, module, sizes, found, windows, module.padding_mode)


def convolution(module: Any, grid: Grid) -> Forward:
    """Of `Conv1d` to `Conv3d`: all padding modes, strides, dilations and groups."""

    def make(sizes: Sizes) -> Local:
        return windows_of(module, grid, sizes)

    def forward(input: Tensor) -> Tensor:
        local = _planned(grid, module, input, make)
        read = local.exchange(input)
        pads = local.pads
        with local.exchange.saving(input, read):
            if module.padding_mode in ("reflect", "replicate"):
                read, pads = _mirrored(read, pads, module.padding_mode)
            return convolve(
                where(module), read, module.weight, module.bias, module.stride, pads,
                module.dilation, module.groups,
            )  # fmt: skip

    return forward


def _mirrored(x: Tensor, pads: tuple[Range, ...], mode: str) -> tuple[Tensor, tuple[Range, ...]]:
    """What is read with its continuation beyond the image, and nothing that is left to pad.

    A negative pad is what was read for the mirror alone.
    """
    widths = [max(n, 0) for pair in reversed(pads) for n in pair]
    if any(widths):
        x = F.pad(x, tuple(widths), mode)
    cut = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pads, x.shape[2:], strict=True)]
    if any((a < 0 or b < 0) for a, b in pads):
        x = x[(slice(None), slice(None), *cut)]
    return x, ((0, 0),) * len(pads)


def transposed_convolution(module: Any, grid: Grid) -> Forward:
    """Of `ConvTranspose1d` to `ConvTranspose3d`."""

    def make(sizes: Sizes) -> Local:
        kernel, place = module.kernel_size, where(module)
        how = plan(place, kernel, module.stride, module.padding, module.dilation)
        found = transposed_sizes(place, sizes, kernel, how, module.output_padding)
        grid.require(place, "outputs", found)
        windows = [
            Window(k, s, before, d)
            for k, s, (before, _), d in zip(
                kernel, how["stride"], how["padding"], how["dilation"], strict=True
            )
        ]
        outputs = grid.ranges(found)
        reads = tuple(
            tuple(w.scattered_from(o, n) for o in of_ranks)
            for w, of_ranks, n in zip(windows, outputs, sizes, strict=True)
        )
        own = grid.mine(outputs)
        starts = zip(windows, grid.mine(reads), own, strict=True)
        pads = tuple((w.before + o[0] - r[0] * w.stride, 0) for w, r, o in starts)
        return Local(grid.exchange(sizes, reads), tuple(b - a for a, b in own), pads)

    def forward(input: Tensor) -> Tensor:
        check_transposed(where(module), input, module.weight, module.bias, module.groups)
        local = _planned(grid, module, input, make)
        read = local.exchange(input)
        with local.exchange.saving(input, read):
            return images.transposed_convolution(
                read, module.weight, module.bias, sizes=local.sizes, stride=module.stride,
                before=tuple(before for before, _ in local.pads), dilation=module.dilation,
                groups=module.groups,
            )  # fmt: skip

    return forward


def max_pool(module: Any, grid: Grid) -> Forward:
    """Of `MaxPool1d` to `MaxPool3d`."""

    def make(sizes: Sizes) -> tuple[Local, Any]:
        found, *how = max_windows(
            where(module), sizes, module.kernel_size, module.stride, module.padding,
            module.dilation, module.ceil_mode,
        )  # fmt: skip
        windows = [Window(k, s, p, d) for k, s, p, d in zip(*how, strict=True)]
        return _windowed(grid, module, sizes, found, windows, "zeros"), how

    def forward(input: Tensor) -> Tensor:
        local, (kernel, stride, _, dilation) = _planned(grid, module, input, make)
        before = tuple(pad for pad, _ in local.pads)
        return pooling.max_pool(
            local.exchange(input), sizes=local.sizes, kernel=kernel, stride=stride, before=before,
            dilation=dilation,
        )  # fmt: skip

    return forward


def _resampled(
    module: Any, grid: Grid, bands_of: Callable[[Sizes], tuple[Band | None, ...]]
) -> Forward:
    """Of layers that are a product with a band matrix along each dimension."""

    def make(sizes: Sizes) -> Local:
        bands = bands_of(sizes)
        found = tuple(
            n if band is None else len(band.first) for n, band in zip(sizes, bands, strict=True)
        )
        grid.require(where(module), "outputs", found)
        outputs = grid.ranges(found)
        made = [
            [(o, None) if band is None else rows(band, o) for o in of_ranks]
            for band, of_ranks in zip(bands, outputs, strict=True)
        ]
        reads = tuple(tuple(one for one, _ in ranges) for ranges in made)
        own = tuple(band for _, band in grid.mine(made))
        return Local(grid.exchange(sizes, reads), bands=own)

    def forward(input: Tensor) -> Tensor:
        local = _planned(grid, module, input, make)
        return pooling.resample(local.exchange(input), bands=local.bands)

    return forward


def average_pool(module: Any, grid: Grid) -> Forward:
    """Of `AvgPool1d` to `AvgPool3d`."""
    return _resampled(
        module, grid,
        lambda sizes: average_bands(
            where(module), sizes, module.kernel_size, module.stride, module.padding,
            module.ceil_mode, module.count_include_pad,
        ),
    )  # fmt: skip


def adaptive_pool(module: Any, grid: Grid) -> Forward:
    """Of `AdaptiveAvgPool1d` to `AdaptiveAvgPool3d`, of as many outputs as ranks or more."""
    return _resampled(
        module, grid, lambda sizes: adaptive_bands(where(module), sizes, module.output_size)
    )


def upsample(module: Any, grid: Grid) -> Forward:
    """Of `Upsample`."""
    return _resampled(
        module, grid,
        lambda sizes: resize_bands(
            sizes, module.size, module.scale_factor, module.mode, module.align_corners
        ),
    )  # fmt: skip


def pixel_shuffle(module: Any, grid: Grid) -> Forward:
    """Of `PixelShuffle`: a block of pixels comes of the places that have any of them."""

    def make(sizes: Sizes) -> tuple[Local, Any]:
        factor = module.upscale_factor
        found = tuple(factor * n for n in sizes)
        if module.size is not None:
            found = tuple(map(min, module.size, found))
        grid.require(where(module), "outputs", found)
        outputs = grid.ranges(found)
        reads = tuple(tuple((a // factor, -(-b // factor)) for a, b in some) for some in outputs)
        pairs = zip(grid.mine(outputs), grid.mine(reads), strict=True)
        kept = [
            slice(out[0] - place[0] * factor, out[1] - place[0] * factor) for out, place in pairs
        ]
        return Local(grid.exchange(sizes, reads)), (slice(None), slice(None), *kept)

    def forward(input: Tensor) -> Tensor:
        local, kept = _planned(grid, module, input, make)
        return module.shuffle(local.exchange(input))[kept]  # type: ignore[no-any-return]

    return forward


def dropout(module: Any, grid: Grid) -> Forward:
    """Of `Dropout`: the mask of the whole image, where this rank's block lies in it."""

    def make(sizes: Sizes) -> Any:
        """The rows of a channel that a rank has, as the operation takes them."""
        *outer, (first, end) = grid.mine(grid.ranges(sizes))
        starts, inner = [first], sizes[-1]
        for (low, high), n in zip(reversed(outer), reversed(sizes[:-1]), strict=True):
            starts = [place * inner + start for place in range(low, high) for start in starts]
            inner *= n
        return [(start, end - first) for start in starts], inner

    def forward(input: Tensor) -> Tensor:
        if module.p == 0 or not module.training:
            return input
        sizes = grid.sizes(module, input)
        part = grid.plan((id(module), sizes), lambda: make(sizes))
        if module.p == 1:
            return input * 0.0
        return fused.dropout(input, p=module.p, name=module.name, part=part)

    return forward
