"""Dropout of a part of what one rank would have: the mask is that of the whole, there."""

from __future__ import annotations

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import Dropout
from hpcml.nn import functional as F
from hpcml.nn.part import Part
from hpcml.parallel.tensor.positions import Positions


class PositionsDropout(Dropout):
    """Between tensor-parallel regions, of the positions that this rank has: (B, T, width)."""

    def __init__(self, dropout: Dropout, positions: Positions) -> None:
        super().__init__(dropout.p)
        self.positions = positions

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        if self.p == 0 or not self.training:
            return input
        if self.positions.features is not None:
            raise UserError(
                f'{self.name}: dropout between "column" and "row" layers: declare it "divided"'
            )
        if not self.positions.divided:
            return F.dropout(input, self.p, self.training, name=self.name)
        part = self.positions.part(input.shape) if input.ndim > 2 else None
        if part is None or part.own != input.shape:
            raise UserError(
                f"{self.name}: dropout of {input.shape}, which is not (samples, positions, width) "
                f"of this rank's positions {list(self.positions.own)}"
            )
        return F.dropout(input, self.p, self.training, name=self.name, part=part)


class DividedDropout(Dropout):
    """Of this rank's features or channels, between a "column" and a "row" layer."""

    def __init__(self, dropout: Dropout, positions: Positions) -> None:
        super().__init__(dropout.p)
        self.positions = positions
        if dropout.p > 0 and positions.cp.size > 1:
            raise UserError(
                f'mesh.cp={positions.cp.size}: {dropout.name}, dropout between "column" and "row" '
                "layers, is divided by features, not by positions too: set mesh.cp=1 or p=0"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        if self.p == 0 or not self.training:
            return input
        width, ranges = self.positions.features or (0, ())
        dim = self.positions.dim % input.ndim
        if input.shape[dim] != sum(end - first for first, end in ranges):
            raise UserError(
                f'{self.name}, "divided": dropout of {input.shape[dim]} features, which is not '
                'what the "column" layer before it has left'
            )
        part = Part((*input.shape[:dim], width, *input.shape[dim + 1 :]), dim, ranges)
        return F.dropout(input, self.p, self.training, name=self.name, part=part)
