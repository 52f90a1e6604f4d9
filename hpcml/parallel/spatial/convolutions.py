"""Convolutions of blocks: each reads what its block of the output needs, and computes that.

Where the image ends, the serial operation pads; where only the block ends, ghosts are there (Dryden
et al. 2019, "Improving strong-scaling of CNN training by exploiting finer-grained parallelism",
section 3).
"""

from __future__ import annotations

from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.ops import images
from hpcml.backend import is_half
from hpcml.nn import functional as F
from hpcml.nn.images import check_filters, check_transposed, convolve, plan, transposed_sizes
from hpcml.nn.module import where
from hpcml.nn.part import Range
from hpcml.parallel.spatial.grid import Grid, Sizes
from hpcml.parallel.spatial.layers import Forward
from hpcml.parallel.spatial.overlap import Overlap, interior, overlapped_convolution
from hpcml.parallel.spatial.windows import Local, planned, windows_along, windows_of


def convolution(module: Any, grid: Grid) -> Forward:
    """Of `Conv1d` to `Conv3d`: all padding modes, strides, dilations and groups."""

    def make(sizes: Sizes) -> tuple[Local, Overlap | None]:
        local = windows_of(module, grid, sizes)
        mode = module.padding_mode
        beside = grid.overlaps and mode == "zeros" and local.exchange.moves
        return local, _overlap(module, grid, sizes, local) if beside else None

    def forward(input: Tensor) -> Tensor:
        check_filters(where(module), input, module.weight, module.bias, module.groups)
        local, beside = planned(grid, module, input, make)
        if beside is not None and not is_half(input.dtype):
            return overlapped_convolution(input, module.weight, module.bias, plan=beside)
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


def _overlap(module: Any, grid: Grid, sizes: Sizes, local: Local) -> Overlap | None:
    """How to compute in pieces; None, on all ranks alike, where one has no interior."""
    windows, outputs = windows_along(module), grid.ranges(local.whole)
    blocks = grid.ranges(sizes)
    inside = [
        [interior(w, out, own, n) for out, own in zip(outs, owns, strict=True)]
        for w, outs, owns, n in zip(windows, outputs, blocks, sizes, strict=True)
    ]
    covered = all(
        read[0] <= own[0] and read[1] >= own[1]
        for reads, owns in zip(local.reads, blocks, strict=True)
        for read, own in zip(reads, owns, strict=True)
    )
    if not covered or any(low >= high for ranges in inside for low, high in ranges):
        return None
    return Overlap(
        local.exchange.halo, windows, module.groups,
        first=tuple(first for first, _ in grid.mine(outputs)),
        read=tuple(first for first, _ in grid.mine(local.reads)),
        own=grid.mine(blocks), outputs=local.sizes, interior=grid.mine(inside),
    )  # fmt: skip


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
        windows = windows_along(module)
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
        local = planned(grid, module, input, make)
        read = local.exchange(input)
        with local.exchange.saving(input, read):
            return images.transposed_convolution(
                read, module.weight, module.bias, sizes=local.sizes, stride=module.stride,
                before=tuple(before for before, _ in local.pads), dilation=module.dilation,
                groups=module.groups,
            )  # fmt: skip

    return forward
