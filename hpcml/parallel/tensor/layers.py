"""Linear layers with divided weights (Shoeybi et al. 2019, "Megatron-LM", section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml import collectives
from hpcml.autograd import Tensor
from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import Linear, Module
from hpcml.nn import functional as F
from hpcml.nn.part import Range, blocks
from hpcml.parallel.tensor.overlap import gathered_linear, scattered_linear
from hpcml.parallel.tensor.parts import block, divide_parameter, sizes
from hpcml.parallel.tensor.positions import Positions

Cuts = Sequence[Sequence[Range]]


class ColumnParallelLinear(Module):
    """Y = X A^T + b with the rows of A, the outputs, divided: X in `I` -> Y in `S(-1)`.

    Forward communicates nothing, backward one all-reduce of the gradient of X (Megatron's f). With
    sequence parallelism X is in `S(-2)`: an all-gather, and backward a reduce-scatter.

    packed: so many projections of equal size side by side, each of which is divided by itself.
    """

    def __init__(
        self, linear: Linear, axis: Axis, *, packed: int = 1, positions: Positions | None = None
    ) -> None:
        super().__init__()
        self.axis = axis
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.positions = positions or Positions(axis, sequence_parallel=False)
        self.cuts = _packs("outputs", linear.out_features, packed, axis)
        self.weight, self.bias = linear.weight, linear.bias
        divide_parameter(self.weight, 0, self.cuts, axis)
        if self.bias is not None:
            divide_parameter(self.bias, 0, self.cuts, axis)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., this rank's outputs)."""
        if input.shape[-1] != self.in_features:
            raise UserError(
                f'{self.name or "ColumnParallelLinear"}, "column" of {self.in_features} inputs: '
                f"{self.positions.called(input.shape[-1])} came: what is divided already goes to "
                'a "row" layer'
            )
        positions = self.positions
        positions.begin_region(self.out_features, self.cuts[self.axis.rank])
        if positions.overlaps:
            return gathered_linear(input, self.weight, self.bias, self.axis, positions.counts)
        return F.linear(positions.enter(input), self.weight, self.bias)


class OutputLinear(ColumnParallelLinear):
    """A column-parallel last layer: classes that a loss takes divided, or gathered for others.

    gathers: give all ranks all outputs, of all positions: `I` on every axis.
    """

    gathers = False

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., this rank's outputs), or all of them."""
        out = super().forward(input)
        self.positions.features = None  # what follows is the loss, which knows
        self.positions.ended += 1
        if not self.gathers:
            return out
        out = collectives.all_gather(out, self.axis, -1, to="I", counts=sizes(self.cuts))
        return self.positions.join(out)


class RowParallelLinear(Module):
    """Y = X A^T + b with the columns of A, the inputs, divided: X in `S(-1)` -> Y in `I`.

    Forward communicates one all-reduce of the products (Megatron's g), backward nothing. With
    sequence parallelism Y is in `S(-2)`: a reduce-scatter, and backward an all-gather. The bias is
    added once, after it, and every rank has it whole.
    """

    def __init__(self, linear: Linear, axis: Axis, *, positions: Positions | None = None) -> None:
        super().__init__()
        self.axis, self.in_features = axis, linear.in_features
        self.positions = positions or Positions(axis, sequence_parallel=False)
        self.cuts = _packs("inputs", linear.in_features, 1, axis)
        self.weight, self.bias = linear.weight, linear.bias
        divide_parameter(self.weight, 1, self.cuts, axis)

    def forward(self, input: Tensor) -> Tensor:
        """(..., this rank's inputs) -> (..., out_features)."""
        if input.shape[-1] != self.weight.shape[1]:
            raise UserError(
                f'{self.name or "RowParallelLinear"}, "row" of {self.in_features} inputs: '
                f"{self.positions.called(input.shape[-1])} came: the layer before it must be "
                '"column", of as many'
            )
        positions = self.positions
        if positions.overlaps:
            positions.features = None
            total = scattered_linear(input, self.weight, self.axis, positions.counts)
        else:
            total = positions.leave(F.linear(input, self.weight))
        return total if self.bias is None else total + self.bias


def _packs(what: str, n: int, packed: int, axis: Axis) -> list[tuple[Range, ...]]:
    """What each rank has of `packed` projections of together n features."""
    if n % packed:
        raise UserError(f"{what}={n} are not {packed} projections of equal size")
    size = n // packed
    block(what, size, axis)
    cuts = blocks(size, axis.size)
    return [
        tuple((pack * size + first, pack * size + end) for pack in range(packed))
        for first, end in cuts
    ]
