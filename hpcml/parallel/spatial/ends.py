"""Where the region ends in which ranks have blocks: from there on each has all, or some samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml import collectives, rng
from hpcml.autograd import Tensor
from hpcml.autograd.mode import watching
from hpcml.autograd.ops import pooling
from hpcml.autograd.ops.pooling import Band
from hpcml.errors import UserError
from hpcml.nn import AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d, Module
from hpcml.nn.images import check_image
from hpcml.nn.module import where
from hpcml.parallel.spatial.cuts import SAMPLES_DIM
from hpcml.parallel.spatial.grid import GATHERED, INSIDE, SAMPLES, Grid, Sizes
from hpcml.parallel.spatial.guard import has_block

STYLES = {"gather": GATHERED, "samples": SAMPLES}
"""Ways to end the region, and what follows."""

_POOLS = (AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d)


def end(module: Any, grid: Grid, style: str) -> Callable[[Tensor], Any]:
    """The forward of the module at which the region ends: it gets whole images.

    "gather": of all samples, on every rank; an all-gather. "samples": of this rank's samples; an
    all-to-all (Dryden et al. 2019, section 3: before fully-connected layers). Of global average
    pooling only sums of channels travel: an all-reduce, or a reduce-scatter over the samples.
    """
    serial, pools = module.forward, _is_global_pool(module)

    def forward(input: Tensor, *others: Any, **named: Any) -> Any:
        if not has_block(grid, module, input):
            return serial(input, *others, **named)
        if grid.state not in (INSIDE, STYLES[style]):
            raise too_late(module, grid)
        if grid.count not in (0, input.shape[0]):
            raise UserError(
                f"{where(module)} gets {input.shape[0]} samples where the divided region ends, "
                f"after another layer with {grid.count}: all ends must have as many"
            )
        with watching(None):
            if pools:
                check_image(where(module), input, module.dims)
            sizes = grid.sizes(module, input)
            grid.count, grid.state = input.shape[0], STYLES[style]
            if pools:
                found = _pooled(input, grid, sizes)
            else:
                found = (grid.gather if style == "gather" else grid.to_samples)(input, sizes)
        first = SAMPLES_DIM if style == "samples" else None
        grid.cuts.note(found.data, (first, *(None,) * (found.ndim - 1)))
        return found if pools else serial(found, *others, **named)

    return forward


def too_late(module: Module, grid: Grid) -> UserError:
    """The error of a module that gets blocks where others had the end of the region."""
    return UserError(
        f"{where(module)} gets blocks of images that {grid.axis.name} divides, after another layer "
        "has ended the divided region: let what takes blocks come before"
    )


def _is_global_pool(module: Any) -> bool:
    if type(module) not in _POOLS:
        return False
    asked = module.output_size
    return all(n == 1 for n in (asked if isinstance(asked, tuple | list) else (asked,)))


def _pooled(x: Tensor, grid: Grid, sizes: Sizes) -> Tensor:
    """The means of all places, of all samples or of this rank's."""
    bands = tuple(Band.of([(0, [1 / n] * own)]) for n, own in zip(sizes, x.shape[2:], strict=True))
    sums = pooling.resample(x, bands=bands)
    if grid.state == GATHERED:
        return collectives.all_reduce(sums, grid.axis, to="R")
    counts = [end - first for first, end in grid.samples(grid.count)]
    return collectives.reduce_scatter(sums, grid.axis, 0, counts=counts)


def numbered(module: Module, grid: Grid) -> Callable[..., Any]:
    """The forward of a module that draws by the numbers of samples, where ranks divide these."""
    serial = module.forward

    def forward(*args: Any, **named: Any) -> Any:
        if grid.own_samples is None:
            return serial(*args, **named)
        with rng.later(grid.own_samples[0]):
            return serial(*args, **named)

    return forward
