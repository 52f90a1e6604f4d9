"""A convolution of a block whose interior is computed while the halo travels.

Outputs whose windows lie in the block need no ghosts. Forward computes them between the start of
the exchange and its end, and the rim after that; backward sends the gradients of ghosts on their
way as soon as they are there, and computes the gradient of the weights meanwhile (Dryden et al.
2019, section 3). More is computed at once without: this pays where a network is between the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hpcml import kernels, memory
from hpcml.autograd import Context, primitive
from hpcml.autograd.ops.arrays import contiguous, same_type
from hpcml.autograd.ops.images import channels_first, channels_last
from hpcml.autograd.record import empty
from hpcml.backend import Array
from hpcml.comm import Halo
from hpcml.nn.part import Range
from hpcml.parallel.spatial.exchange import slabs
from hpcml.parallel.spatial.geometry import Window

Box = tuple[Range, ...]


@dataclass(frozen=True)
class Overlap:
    """How a rank computes its block of a convolution in pieces.

    windows: along each dimension. first: the output, counted in the whole, that is this block's
    first. read: the first place that is read. own: the places of the block. outputs: how many.
    interior: the outputs of the block, counted in it, that need no ghosts.
    """

    halo: Halo
    windows: tuple[Window, ...]
    groups: int
    first: tuple[int, ...]
    read: tuple[int, ...]
    own: Box
    outputs: tuple[int, ...]
    interior: Box

    def rim(self) -> Iterator[Box]:
        """Disjoint boxes of the other outputs."""
        for dim, ((low, high), n) in enumerate(zip(self.interior, self.outputs, strict=True)):
            for part in ((0, low), (high, n)):
                if part[0] < part[1]:
                    rest = [(0, m) for m in self.outputs[dim + 1 :]]
                    yield (*self.interior[:dim], part, *rest)

    @property
    def how(self) -> tuple[tuple[int, ...], ...]:
        """Stride, padding before what is read, and dilation, as kernels take them."""
        before = [
            start - (o * w.stride - w.before)
            for start, o, w in zip(self.read, self.first, self.windows, strict=True)
        ]
        strides, dilations = zip(*((w.stride, w.dilation) for w in self.windows), strict=True)
        return strides, tuple(before), dilations

    def part(self, box: Box, source: Array, starts: Sequence[int]) -> tuple[Array, Any]:
        """What a box of outputs reads of `source` (N, *S, C), whose places begin at `starts`."""
        index, before = [slice(None)], []
        ends = zip(box, self.first, self.windows, starts, source.shape[1:-1], strict=True)
        for (low, high), o, window, start, n in ends:
            first, end = window.reads((o + low, o + high))
            index.append(slice(max(first - start, 0), min(end - start, n)))
            before.append(max(start - first, 0))
        strides, _, dilations = self.how
        return contiguous(source[tuple(index)]), (strides, tuple(before), dilations, self.groups)


def interior(window: Window, outputs: Range, own: Range, n: int) -> Range:
    """Which of a block's outputs, counted in it, read nothing but the block and padding."""
    first, end = outputs
    low, high = first, end
    while low < end and own[0] > 0 and window.reads((low, low + 1))[0] < own[0]:
        low += 1
    while high > low and own[1] < n and window.reads((high - 1, high))[1] > own[1]:
        high -= 1
    return low - first, high - first


@primitive
def overlapped_convolution(
    ctx: Context, x: Array, weight: Array, bias: Array | None, *, plan: Overlap
) -> Array:
    """x (N, C, *S), this rank's block -> (N, F, *S'), its block of the convolution of the whole.

    Zero padding. Collective, and its adjoint.
    """
    same_type(ctx, "x", "weight", "bias")
    block = channels_last(x)
    with memory.category("buffers"):
        wide = empty(plan.halo.padded(block.shape), block)
    request = plan.halo.start(block, wide)
    out = empty((len(x), *plan.outputs, len(weight)), x)
    start = empty((0,), x) if bias is None else contiguous(bias)
    own = [first for first, _ in plan.own]
    _compute(plan, plan.interior, block, own, weight, start, out)
    request.wait()
    for box in plan.rim():
        _compute(plan, box, wide, plan.read, weight, start, out)
    rims = []
    if ctx.needs[1]:
        for index in slabs(plan.halo):
            rims.append(empty(wide[index].shape, wide))
            rims[-1][...] = wide[index]
    ctx.attributes = {"plan": plan}
    ctx.save(weight if ctx.needs[0] else None, x if ctx.needs[1] else None, *rims)
    return channels_first(out)


def _compute(
    plan: Overlap, box: Box, source: Array, starts: Sequence[int], weight: Array, start: Array,
    out: Array,
) -> None:  # fmt: skip
    read, how = plan.part(box, source, starts)
    made = empty((len(out), *(high - low for low, high in box), out.shape[-1]), out)
    kernels.images(out).convolve(read, contiguous(weight), start, *how, made)
    out[(slice(None), *(slice(*part) for part in box))] = made


@overlapped_convolution.adjoint
def overlapped_convolution_x(ctx: Context, g: Array) -> Array:
    """Gradients of ghosts go to their owners; that of the weights is computed meanwhile."""
    plan: Overlap = ctx.attributes["plan"]
    weight = ctx.saved[0]
    n, channels, *sizes = ctx.shapes[0]
    with memory.category("buffers"):
        wide = empty(plan.halo.padded((n, *sizes, channels)), g)
    strides, before, dilations = plan.how
    kernels.images(g).convolve_input_gradient(
        channels_last(g), contiguous(weight), empty((0,), g), strides, before, dilations,
        plan.groups, wide,
    )  # fmt: skip
    out = empty((n, *sizes, channels), g)
    request = plan.halo.start_adjoint(wide, out)
    if ctx.needs[1]:
        ctx.attributes["weight"] = _weight_gradient(ctx, g, empty(ctx.shapes[1], g))
    request.wait()
    return ctx.own(channels_first(out))


@overlapped_convolution.adjoint
def overlapped_convolution_weight(ctx: Context, g: Array) -> Array:
    """This rank's share: its block of the output's gradient with what it has read."""
    out = ctx.empty(ctx.shapes[1], g)
    made = ctx.attributes.pop("weight", None)
    if made is None:
        return _weight_gradient(ctx, g, out)
    out[...] = made
    return out


@overlapped_convolution.adjoint
def overlapped_convolution_bias(ctx: Context, g: Array) -> Array:
    """This rank's share."""
    out, last = ctx.empty(ctx.shapes[2], g), channels_last(g)
    kernels.of(g).column_sums(last.reshape(-1, last.shape[-1]), out)
    return out


def _weight_gradient(ctx: Context, g: Array, out: Array) -> Array:
    plan: Overlap = ctx.attributes["plan"]
    _, x, *rims = ctx.saved
    block = channels_last(x)
    with memory.category("buffers"):
        wide = empty(plan.halo.padded(block.shape), block)
    wide[plan.halo.inside(wide.ndim)] = block
    for index, rim in zip(slabs(plan.halo), rims, strict=True):
        wide[index] = rim
    kernels.images(g).convolve_weight_gradient(channels_last(g), wide, *plan.how, plan.groups, out)
    return out
