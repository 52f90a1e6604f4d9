"""Cross-entropy of classes that ranks divide (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml import collectives, kernels
from hpcml.autograd import Context, Tensor, primitive
from hpcml.autograd.operators import array_of
from hpcml.autograd.ops.arrays import contiguous
from hpcml.autograd.record import sums
from hpcml.backend import Array, xp
from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.nn.part import Range
from hpcml.parallel.tensor.parts import block
from hpcml.parallel.tensor.positions import Positions, pick
from hpcml.parallel.tensor.vocab import check_range


class VocabParallelCrossEntropyLoss(Module):
    """`nn.CrossEntropyLoss` ("mean") of logits as an `OutputLinear` gives them: -> `I`.

    Logits (N, this rank's classes) or (N, this rank's classes, d...); targets of all positions, of
    which a rank takes its own; the mean is over all of them.
    """

    def __init__(
        self, axis: Axis, positions: Positions, *, classes: int, ignore_index: int
    ) -> None:
        super().__init__()
        self.axis, self.positions = axis, positions
        self.classes, self.ignore_index = classes, ignore_index

    def forward(self, input: Tensor, target: Any) -> Tensor:
        """Logits of this rank's classes, targets of all positions -> one number."""
        numbers, cp = array_of(target), self.positions.cp
        count = counted(numbers != self.ignore_index)
        if input.ndim > 2:  # classes to the last dim
            input = input.permute(0, *range(2, input.ndim), 1).flatten(0, -2)
        if cp.size > 1:
            length = self.positions.length
            if numbers.size % max(length, 1):
                raise UserError(
                    f"mesh.cp={cp.size}: targets {numbers.shape} for sequences of {length}: give "
                    "one for each position, or set mesh.cp=1"
                )
            numbers = pick(numbers.reshape(-1, length), self.positions.context)
        mean = vocab_parallel_cross_entropy(
            input, numbers.reshape(-1), self.axis, classes=self.classes,
            ignore_index=self.ignore_index, count=count,
        )  # fmt: skip
        return collectives.all_reduce(mean, cp, to="I")


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Any,
    axis: Axis,
    *,
    classes: int,
    ignore_index: int = -100,
    count: Any = None,
) -> Tensor:
    """The mean of -log softmax(logits)[target], the classes divided: `S(-1)` -> `I`.

    logits (N, this rank's block of the `classes`), as of a `ColumnParallelLinear`; target (N),
    numbers of classes of all ranks; `ignore_index` does not count. The ranks exchange three numbers
    a row, not the logits (Shoeybi et al. 2019, section 3): the largest logarithm of a sum of
    exponentials, the sum of these relative to it, and the loss of the target relative to it.

    count: by which the sum is divided, where the rows are some of those that the mean is over.
    """
    mine = block("classes", classes, axis)
    if logits.ndim != 2 or logits.shape[1] != mine[1] - mine[0]:
        raise ValueError(
            f"logits {logits.shape}: of {classes} classes this rank has {mine[1] - mine[0]}"
        )
    numbers = array_of(target)
    if numbers.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} need targets of shape {logits.shape[:1]}, not "
                         f"{numbers.shape}")  # fmt: skip
    used = numbers != ignore_index
    if isinstance(numbers, np.ndarray):
        check_range("target", numbers[used], classes)
    count = counted(used) if count is None else count
    return _cross_entropy(logits, numbers, axis=axis, mine=mine, used=used, count=count)


def counted(used: Array) -> Any:
    """How many are; of a GPU a number there, for which nobody waits."""
    count = used.sum()
    return int(count) if isinstance(used, np.ndarray) else count


@primitive
def _cross_entropy(
    ctx: Context, logits: Array, target: Array, *,
    axis: Axis, mine: Range, used: Array, count: Any,
) -> Array:  # fmt: skip
    m = xp(logits)
    outside = mine[1] - mine[0]  # the place of targets whose class another rank has
    inside = used & (target >= mine[0]) & (target < mine[1])
    place = m.where(inside, target - mine[0], outside).astype(np.int64)
    own, lse = sums(target.shape, logits), sums(target.shape, logits)
    kernels.of(logits).cross_entropy(logits, place, outside, own, lse)
    most = axis.allreduce(lse, "max")
    both = sums((2, len(target)), logits)
    m.exp(lse - most, out=both[0])
    both[1] = m.where(inside, own + (most - lse), 0)
    axis.allreduce(both, out=both)
    rest = m.log(both[0])
    ctx.attributes = m.where(used, place, -1), count
    ctx.save(logits, most + rest)
    total = m.where(used, both[1] + rest, 0).sum(dtype=np.float64)  # many small terms
    none = m is np and not count  # NumPy would warn of 0 / 0
    return m.asarray(m.nan if none else total / count, dtype=lse.dtype)


_cross_entropy.on_device = True


@_cross_entropy.adjoint
def _cross_entropy_logits(ctx: Context, g: Array) -> Array:
    logits, lse = ctx.saved
    place, count = ctx.attributes
    m = xp(g)
    count = max(count, 1) if isinstance(count, int) else m.maximum(count, 1)
    scale = contiguous(m.broadcast_to(g / count, lse.shape).astype(lse.dtype, copy=False))
    out = ctx.empty(logits.shape, logits)
    kernels.of(logits).cross_entropy_backward(logits, place, -1, lse, scale, out)
    return out
