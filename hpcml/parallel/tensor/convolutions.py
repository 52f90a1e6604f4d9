"""Convolutions whose filters or channels ranks divide, and what lies between them.

Dryden et al. 2019, "Channel and filter parallelism for large-scale CNN training": with the filters
divided each rank makes some channels of the output, with the channels divided each makes a part of
every sum. One after the other they need one sum over the ranks, as Megatron's linear layers do; and
batch normalisation, pooling and whatever else keeps channels apart communicates nothing between
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Conv1d, Conv2d, Conv3d, Module
from hpcml.nn.part import blocks
from hpcml.parallel.tensor.parts import block, divide_parameter
from hpcml.parallel.tensor.positions import Positions

CONVOLUTIONS = Conv1d, Conv2d, Conv3d
NORMS = BatchNorm1d, BatchNorm2d, BatchNorm3d


class ColumnParallelConv(Module):
    """A convolution with its filters divided: X in `I` -> Y in `S(1)`, this rank's channels.

    Forward communicates nothing, backward one all-reduce of the gradient of X.
    """

    def __init__(self, conv: Any, axis: Axis, *, positions: Positions | None = None) -> None:
        super().__init__()
        self.positions = _positions(conv, "column", axis, positions)
        block("filters", conv.out_channels, axis)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.cuts = [(ranges,) for ranges in blocks(conv.out_channels, axis.size)]
        self.weight, self.bias = conv.weight, conv.bias
        divide_parameter(self.weight, 0, self.cuts, axis)
        if self.bias is not None:
            divide_parameter(self.bias, 0, self.cuts, axis)
        self._convolve = conv.forward

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, this rank's filters, *S')."""
        if input.ndim > 1 and input.shape[1] != self.in_channels:
            raise UserError(
                f'{self.name or "ColumnParallelConv"}, "column" of {self.in_channels} channels: '
                f"{self.positions.called(input.shape[1])} came: what is divided already goes to a "
                '"row" layer'
            )
        positions = self.positions
        out: Tensor = self._convolve(_first(positions.enter(_last(input))))
        positions.begin_region(self.out_channels, self.cuts[positions.tp.rank], dim=1)
        return out


class RowParallelConv(Module):
    """A convolution with its channels divided: X in `S(1)` -> Y in `I`, summed over the ranks.

    Forward communicates one all-reduce of Y, backward nothing. The bias is added once, after it,
    and every rank has it whole.
    """

    def __init__(self, conv: Any, axis: Axis, *, positions: Positions | None = None) -> None:
        super().__init__()
        self.positions = _positions(conv, "row", axis, positions)
        block("channels", conv.in_channels, axis)
        self.in_channels = conv.in_channels
        self.weight, self.bias = conv.weight, conv.bias
        cuts = [(ranges,) for ranges in blocks(conv.in_channels, axis.size)]
        divide_parameter(self.weight, 1, cuts, axis)
        conv.bias = None
        self._convolve = conv.forward

    def forward(self, input: Tensor) -> Tensor:
        """(N, this rank's channels, *S) -> (N, F, *S')."""
        if input.ndim > 1 and input.shape[1] != self.weight.shape[1]:
            raise UserError(
                f'{self.name or "RowParallelConv"}, "row" of {self.in_channels} channels: '
                f"{self.positions.called(input.shape[1])} came: the layer before it must be "
                '"column", of as many'
            )
        total = _first(self.positions.leave(_last(self._convolve(input))))
        if self.bias is None:
            return total
        out: Tensor = total + self.bias.reshape(1, -1, *(1,) * (total.ndim - 2))
        return out


def _positions(conv: Any, style: str, axis: Axis, positions: Positions | None) -> Positions:
    """Of whole images; refuses what is not divided by channels so."""
    if conv.groups > 1:
        raise UserError(
            f'{conv.name}, "{style}": it has groups={conv.groups}: declare it "divided", between '
            'a "column" and a "row" layer'
        )
    if positions is not None and positions.divided:
        raise UserError(
            f'{conv.name}, "{style}": ranks that divide sequences do not divide channels of '
            "images: set tensor.sequence_parallel=false and mesh.cp=1"
        )
    return positions or Positions(axis, sequence_parallel=False)


def _last(x: Tensor) -> Tensor:
    """(N, C, *S) as (N, *S, C): as it lies in memory, so that to communicate copies nothing."""
    return x.permute(0, *range(2, x.ndim), 1)


def _first(x: Tensor) -> Tensor:
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


class _OfPart:
    """A hook before a layer of which this rank has some channels: it refuses others."""

    def __init__(self, whole: int, takes: int, positions: Positions) -> None:
        self.whole, self.takes, self.positions = whole, takes, positions

    def __call__(self, module: Module, inputs: tuple[Any, ...]) -> None:
        came = inputs[0].shape[1:2]
        if came and came[0] != self.takes:
            raise UserError(
                f'{module.name}, "divided" of {self.whole} channels: '
                f'{self.positions.called(came[0])} came: a layer before it must be "column", of as '
                "many"
            )


def divide_groups(conv: Any, positions: Positions) -> None:
    """Let a convolution with groups compute those of this rank's channels, in place.

    Raises UserError where a group would be of two ranks.
    """
    if conv.weight.part is not None:
        return
    axis = positions.tp
    groups, each = conv.groups, (conv.in_channels, conv.out_channels)
    cuts = [blocks(n, axis.size) for n in each]
    if any(first % (n // groups) for n, of_all in zip(each, cuts, strict=True)
           for first, _ in of_all):  # fmt: skip
        raise UserError(
            f'{conv.name}, "divided": groups={groups} of {each[0]} channels and {each[1]} filters '
            f"cannot be divided among {axis.size} ranks along {axis.name}: use a number of ranks "
            "that divides them"
        )
    own = [end - first for first, end in (of_all[axis.rank] for of_all in cuts)]
    filters = [(ranges,) for ranges in cuts[1]]
    divide_parameter(conv.weight, 0, filters, axis)
    if conv.bias is not None:
        divide_parameter(conv.bias, 0, filters, axis)
    conv.groups = own[0] * groups // each[0]
    conv.in_channels, conv.out_channels = own
    conv.register_forward_pre_hook(_OfPart(each[0], own[0], positions))


def divide_norm(norm: Any, positions: Positions) -> None:
    """Let batch normalisation have this rank's channels, parameters and buffers, in place."""
    if hasattr(norm, "counts"):
        return
    cuts = blocks(norm.num_features, positions.tp.size)
    first, end = cuts[positions.tp.rank]
    norm.register_forward_pre_hook(_OfPart(norm.num_features, end - first, positions))
    norm.num_features = end - first
    norm.counts = [end - first for first, end in cuts]
    for name, buffer in list(norm._buffers.items()):
        if buffer.ndim:
            norm.register_buffer(name, Tensor(buffer.data[first:end].copy()))


def whole_buffer(norm: Any, name: str, axis: Axis) -> Array:
    """A buffer of a normalisation of all channels, if ranks divide these. Collective."""
    own: Array = np.array(norm._buffers[name].data)
    counts = getattr(norm, "counts", None)
    if counts is None or not own.ndim:
        return own
    whole: Array = axis.allgather(own, counts=counts)
    return whole
