"""Where the region ends in which ranks have blocks: from there on each has all, or some samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml import collectives, rng
from hpcml.autograd import Tensor
from hpcml.autograd.ops import pooling
from hpcml.autograd.ops.pooling import Band
from hpcml.nn import AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d, Module
from hpcml.parallel.spatial.grid import GATHERED, SAMPLES, Grid, Sizes

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
        if not grid.inside:
            return serial(input, *others, **named)
        sizes = grid.sizes(module, input)
        grid.count = input.shape[0]
        grid.state = STYLES[style]
        if pools:
            return _pooled(input, grid, sizes)
        whole = grid.gather if style == "gather" else grid.to_samples
        return serial(whole(input, sizes), *others, **named)

    return forward


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
