"""Dropout of a part of what one rank would have: the mask is that of the whole, there."""

from __future__ import annotations

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import Dropout
from hpcml.nn import functional as F
from hpcml.nn.part import Part
from hpcml.parallel.tensor.positions import Positions


class PositionsDropout(Dropout):
    """Of this rank's positions, between tensor-parallel regions: (B, T, width)."""

    def __init__(self, dropout: Dropout, positions: Positions) -> None:
        super().__init__(dropout.p)
        self.positions = positions

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        part = self.positions.part(input.shape)
        if part.own != input.shape:
            raise UserError(
                f"{self.name}: dropout of {input.shape}, where this rank has {part.own} of "
                f'{part.shape}: between "column" and "row" layers declare it "divided"'
            )
        return F.dropout(input, self.p, self.training, name=self.name, part=part)


class DividedDropout(Dropout):
    """Of this rank's features, between a "column" and a "row" layer: (B, ..., features)."""

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
        width, ranges = self.positions.features
        part = Part((*input.shape[:-1], width), input.ndim - 1, ranges)
        return F.dropout(input, self.p, self.training, name=self.name, part=part)
