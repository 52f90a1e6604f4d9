"""How sizes and parameters are divided among the ranks of an axis."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import Parameter
from hpcml.nn.part import Part, Range, blocks


def block(what: str, n: int, axis: Axis) -> Range:
    """This rank's share of `n`; refuses more ranks than there are of `what`."""
    if n < axis.size:
        raise UserError(
            f"{what}={n} cannot be divided among {axis.size} ranks along {axis.name}: "
            f"set mesh.{axis.name}={n} or fewer"
        )
    return blocks(n, axis.size)[axis.rank]


def sizes(cuts: Sequence[Sequence[Range]]) -> list[int]:
    """How many each rank has."""
    return [sum(end - first for first, end in ranges) for ranges in cuts]


def divide_parameter(
    parameter: Parameter, dim: int, cuts: Sequence[Sequence[Range]], axis: Axis
) -> None:
    """Divide a parameter, once: one that two layers share must be divided alike for both.

    cuts: the ranges along `dim` of each rank of the axis.
    """
    if axis.size == 1:
        return
    parts = tuple(Part(parameter.whole_shape, dim, tuple(ranges)) for ranges in cuts)
    if parameter.part is None:
        parameter.divide(parts, axis.rank, axis.name)
    elif parameter.parts != parts:
        raise UserError(
            f"{parameter.name} is shared and divided already, along dim {parameter.part.dim}: take "
            "a layer that divides it alike, or do not share it"
        )
