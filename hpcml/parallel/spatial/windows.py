"""What a rank reads and pads for its block of a layer's output, worked out once a size of input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.ops.pooling import Band
from hpcml.errors import UserError
from hpcml.nn.images import check_image, plan, window_sizes
from hpcml.nn.module import where
from hpcml.nn.part import Range
from hpcml.parallel.spatial.exchange import Exchange
from hpcml.parallel.spatial.geometry import Window, mirrored, within
from hpcml.parallel.spatial.grid import Grid, Reads, Sizes


@dataclass(frozen=True)
class Local:
    """What a rank does for its block of a layer's output."""

    exchange: Exchange
    sizes: Sizes = ()
    """Of the block of the output."""
    pads: tuple[Range, ...] = ()
    """Before and after what is read, where that ends with the image."""
    bands: tuple[Band | None, ...] = ()
    whole: Sizes = ()
    """Of the whole output, and what each rank reads."""
    reads: Reads = ()


def planned(grid: Grid, module: Any, x: Tensor, make: Callable[[Sizes], Any]) -> Any:
    """What `make` works out for the sizes of the whole of which x is a block; kept."""
    check_image(where(module), x, getattr(module, "dims", len(grid.whole)))
    sizes = grid.sizes(module, x)
    return grid.plan((id(module), sizes), lambda: make(sizes))


def windowed(
    grid: Grid, module: Any, sizes: Sizes, found: Sizes, windows: Sequence[Window], mode: str
) -> Local:
    """For windows over an image of `sizes`, of which there are `found`; mode: of the padding."""
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
    return Local(exchange, own, pads, whole=tuple(found), reads=reads)


def windows_of(module: Any, grid: Grid, sizes: Sizes) -> Local:
    """What a rank does for its block of a convolution of images of these sizes."""
    kernel, place = module.kernel_size, where(module)
    how = plan(place, kernel, module.stride, module.padding, module.dilation)
    found = window_sizes(place, sizes, kernel, how, module.padding_mode)
    return windowed(grid, module, sizes, found, windows_along(module), module.padding_mode)


def windows_along(module: Any) -> tuple[Window, ...]:
    """Of a convolution, or a transposed one, along each dimension."""
    kernel = module.kernel_size
    how = plan(where(module), kernel, module.stride, module.padding, module.dilation)
    befores = [before for before, _ in how["padding"]]
    return tuple(map(Window, kernel, how["stride"], befores, how["dilation"]))
