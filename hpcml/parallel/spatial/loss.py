"""Losses of what ranks divide: each computes its share of the mean over the whole batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml import collectives
from hpcml.autograd import Tensor
from hpcml.autograd.operators import array_of
from hpcml.errors import UserError
from hpcml.nn import CrossEntropyLoss, Module, MSELoss
from hpcml.nn import functional as F
from hpcml.parallel.scores import Metric
from hpcml.parallel.spatial.grid import INSIDE, OUTSIDE, Grid


class SpatialLoss(Module):
    """A loss of a divided model's outputs: -> `I`, the mean over all pixels or samples.

    Outputs of blocks: `nn.CrossEntropyLoss` and `nn.MSELoss` with reduction "mean" take each rank's
    pixels, and divide by how many there are in all; for any other loss, outputs and targets are
    gathered. After the end of the region any loss that is a mean over samples does, and where ranks
    divide these, `nn.CrossEntropyLoss` by how many targets of all count.
    """

    def __init__(self, loss: Any, grid: Grid) -> None:
        super().__init__()
        self.serial, self.grid = loss, grid

    def forward(self, input: Any, target: Any) -> Tensor:
        """Outputs and targets as this rank has them; targets of all samples where it has some."""
        share = self._share(input, target)
        self.grid.ended, self.grid.state = self.grid.state, OUTSIDE
        return collectives.all_reduce(share, self.grid.axis, to="I")

    def _share(self, input: Any, target: Any) -> Tensor:
        grid = self.grid
        if grid.inside:
            if self._is_mean(CrossEntropyLoss):
                self._check_pixels(input, target)
                count = int(grid.axis.allreduce(np.array([_counted(self.serial, target)]))[0])
                return _cross_entropy(self.serial, input, target, count)
            if self._is_mean(MSELoss):
                self._check_pixels(input, target)
                return _squares(grid, input, target)
            input, target = grid.joined(self, input), self._joined(target)
        elif grid.own_samples is not None:
            first, end = grid.own_samples
            if grid.count < grid.axis.size:
                _require_tensor(input)
            if first == end:  # backward goes the way of the other ranks
                return input.sum() * 0.0  # type: ignore[no-any-return]
            if self._is_mean(CrossEntropyLoss):
                count = _counted(self.serial, target)
                return _cross_entropy(self.serial, input, target[first:end], count)
            return self._of(input, target[first:end]) * ((end - first) / grid.count)
        return self._of(input, target) * (1 / grid.axis.size)

    def _is_mean(self, kind: type[CrossEntropyLoss | MSELoss]) -> bool:
        return type(self.serial) is kind and self.serial.reduction == "mean"

    def _of(self, input: Any, target: Any) -> Tensor:
        loss = self.serial(input, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss must be a tensor of one element, the mean over samples, not {found}"
            )
        return loss

    def _check_pixels(self, input: Tensor, target: Any) -> None:
        """Raise UserError, on all ranks alike, for targets of other pixels than the outputs'."""
        found = self.grid.sizes(self, input)
        given = self.grid.sizes(self, self._with_channels(target))
        if given != found:
            raise UserError(
                f"targets of {given} for outputs of {found}: give a target for each pixel of the "
                "model's outputs"
            )

    def _with_channels(self, target: Any) -> Tensor:
        """A target (N, *S) or (N, C, *S) as (N, C, *S)."""
        array = array_of(target)
        return Tensor(array[:, None] if array.ndim == len(self.grid.whole) + 1 else array)

    def _joined(self, target: Any) -> Any:
        """All of a target (N, *S) or (N, C, *S)."""
        whole = self.grid.joined(self, self._with_channels(target)).data
        missing = np.ndim(array_of(target)) == len(self.grid.whole) + 1
        return Tensor(whole[:, 0] if missing else whole)


def measured(metric: Metric, grid: Grid) -> Metric:
    """A metric of the outputs of all ranks: a mean over pixels or samples, from each rank's own."""

    def all_of(outputs: Any, target: Any) -> float:
        own = grid.own(grid.ended)
        if own is not None:
            target = target[own[0] : own[1]]
        sizes = outputs.shape[2:] if grid.ended == INSIDE else ()
        count = math.prod((len(outputs.data), *sizes))
        value = metric(outputs, target) if count else 0.0
        sums = grid.axis.allreduce(np.array([value * count, count]))
        return float(sums[0] / sums[1])

    return all_of


def _require_tensor(input: Any) -> None:
    """Refuse, on all ranks, outputs of which one without samples makes no loss."""
    if not isinstance(input, Tensor):
        raise UserError(
            'spatial = "samples" with fewer samples than ranks needs a model that returns one '
            'tensor: use "gather", or larger microbatches'
        )


def _counted(loss: CrossEntropyLoss, target: Any) -> int:
    """How many targets are not ignored."""
    return int((array_of(target) != loss.ignore_index).sum())


def _cross_entropy(loss: CrossEntropyLoss, input: Tensor, target: Any, count: int) -> Tensor:
    """Of this rank's targets, a share in the mean over `count`."""
    total = F.cross_entropy(input, target, ignore_index=loss.ignore_index, reduction="sum")
    return total * (1 / count if count else np.nan)


def _squares(grid: Grid, input: Tensor, target: Any) -> Tensor:
    count = int(grid.axis.allreduce(np.array([input.numel()]))[0])
    return F.mse_loss(input, target, reduction="sum") * (1 / max(count, 1))
