"""Layers on blocks of images beside convolutions: pools, resizing, shuffled pixels, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.ops import fused, pooling
from hpcml.autograd.ops.pooling import Band
from hpcml.nn.module import where
from hpcml.nn.pools import adaptive_bands, average_bands, max_windows, resize_bands
from hpcml.parallel.spatial.geometry import Window, rows
from hpcml.parallel.spatial.grid import Grid, Sizes
from hpcml.parallel.spatial.windows import Local, planned, windowed

Forward = Callable[[Tensor], Tensor]


def max_pool(module: Any, grid: Grid) -> Forward:
    """Of `MaxPool1d` to `MaxPool3d`."""

    def make(sizes: Sizes) -> tuple[Local, Any]:
        found, *how = max_windows(
            where(module), sizes, module.kernel_size, module.stride, module.padding,
            module.dilation, module.ceil_mode,
        )  # fmt: skip
        windows = [Window(k, s, p, d) for k, s, p, d in zip(*how, strict=True)]
        return windowed(grid, module, sizes, found, windows, "zeros"), how

    def forward(input: Tensor) -> Tensor:
        local, (kernel, stride, _, dilation) = planned(grid, module, input, make)
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
        local = planned(grid, module, input, make)
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
            where(module), sizes, module.size, module.scale_factor, module.mode,
            module.align_corners,
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
        local, kept = planned(grid, module, input, make)
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
