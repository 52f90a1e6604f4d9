"""Rank arithmetic: an ordered set of named axes and where each rank stands on them. No MPI here.

Rank and coordinates relate as in a C-ordered array: the first axis is the outermost and varies
slowest, so that neighbours along the last axis are neighbouring ranks, usually on one node.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import SupportsIndex

from hpcml.errors import UserError

AXES = ("pp", "dp", "cp", "sp_d", "sp_h", "sp_w", "tp")
"""Names of the usual axes, outermost first: pipeline, data, context, space (3), tensor."""

FILL = "dp"
"""The axis that takes what is left when its size is 0."""


@dataclass(frozen=True)
class Grid:
    """Named axes, outermost first, and the rank arithmetic on them."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks: the product of the sizes."""
        return prod(self.shape)

    @property
    def sizes(self) -> dict[str, int]:
        """Size by name, in the order of the mesh."""
        return dict(zip(self.names, self.shape, strict=True))

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank by axis name."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.size} ranks")
        found = []
        for extent in reversed(self.shape):
            rank, position = divmod(rank, extent)
            found.append(position)
        return dict(zip(self.names, reversed(found), strict=True))

    def rank(self, coords: Mapping[str, int]) -> int:
        """Rank at the given coordinates; an axis that is not named counts as 0."""
        for name in coords:
            if name not in self.names:
                raise ValueError(f"no axis {name!r} in the mesh ({', '.join(self.names)})")
        rank = 0
        for name, extent in zip(self.names, self.shape, strict=True):
            position = coords.get(name, 0)
            if not 0 <= position < extent:
                raise ValueError(f"{name}={position} is outside the axis {name}({extent})")
            rank = rank * extent + position
        return rank

    def ordered(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """These names without repetition, in the order of the mesh."""
        return tuple(name for name in self.names if name in names)

    def group(self, rank: int, *names: str) -> tuple[int, ...]:
        """Ranks that share all coordinates with `rank` except those along `names`.

        They are listed in the order of the mesh, whatever the order of `names`, so the position in
        the tuple is the rank on the (product) axis.
        """
        here = self.coords(rank)
        along = self.ordered(names)
        spans = [range(self.sizes[name]) for name in along]
        return tuple(
            self.rank({**here, **dict(zip(along, place, strict=True))}) for place in product(*spans)
        )

    def __str__(self) -> str:
        return show(self.sizes)


def show(sizes: Mapping[str, int]) -> str:
    """Axes as `pp(2) * dp(2)`; those of size 1 are left out, unless all are."""
    large = {name: n for name, n in sizes.items() if n != 1} or dict([next(iter(sizes.items()))])
    return " * ".join(f"{name}({n})" for name, n in large.items())


def split(name: str, size: int, rank: int, inner: int) -> tuple[range, range]:
    """The ranks with which `rank` of an axis is joined if groups of `inner` are cut from it.

    First those of equal place in the other groups, then those of its own group.
    Raises `UserError` if the size of the axis is no multiple of `inner`.
    """
    divisors = [count for count in range(1, size + 1) if size % count == 0]
    if inner not in divisors:
        fits = f"{', '.join(map(str, divisors[:-1]))} or " if size > 1 else ""
        raise UserError(
            f"{name}({size}) cannot be cut into groups of {inner} ranks: use {fits}{size}"
        )
    first = rank - rank % inner
    return range(rank % inner, size, inner), range(first, first + inner)


def usual(sizes: Mapping[str, int]) -> dict[str, int]:
    """Complete sizes given by keyword: usual names only, `dp` fills up, all others 1.

    Raises `UserError` for a name that is not one of `AXES`.
    """
    for name in sizes:
        if name not in AXES:
            raise UserError(
                f"mesh.{name}: there is no such axis; the axes are {', '.join(AXES)} "
                "(pass an ordered mapping for names of your own)"
            )
    return {name: sizes.get(name, 0 if name == FILL else 1) for name in AXES}


def resolve(sizes: Mapping[str, int], ranks: int) -> Grid:
    """Lay `ranks` ranks out on axes of these sizes, outermost first; `dp=0` takes what is left.

    Raises `UserError` when a size is negative, no whole number, or zero on another axis than `dp`,
    and when the product is not the number of ranks.
    """
    if not sizes:
        raise UserError("mesh: no axes were given; name at least one, such as {'dp': 0}")
    checked = {_named(name): _checked(name, size) for name, size in sizes.items()}
    fixed = prod(size for size in checked.values() if size)
    if checked.get(FILL) == 0:
        if ranks % fixed:
            raise _does_not_divide(checked, fixed, ranks)
        checked[FILL] = ranks // fixed
    elif fixed != ranks:
        raise _does_not_multiply(checked, fixed, ranks)
    return Grid(tuple(checked), tuple(checked.values()))


def _named(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise UserError(f"mesh: {name!r} is no name of an axis; use a string such as 'dp'")
    return name


def _checked(name: str, size: object) -> int:
    # NumPy's integers have __index__ as well; Python's bool has it too, but is a mistake here.
    if isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise UserError(f"mesh.{name}={size!r} is not a whole number of ranks: use an integer")
    whole = operator.index(size)
    if whole < 0 or (whole == 0 and name != FILL):
        allowed = "0 (what is left) or more" if name == FILL else "1 or more"
        raise UserError(f"mesh.{name}={whole} is not a number of ranks: use {allowed}")
    return whole


def _started(ranks: int) -> str:
    return f"{ranks} {'was' if ranks == 1 else 'were'} started"


def _does_not_multiply(sizes: Mapping[str, int], fixed: int, ranks: int) -> UserError:
    rest = fixed // sizes.get(FILL, 1)
    fill = f"set mesh.{FILL}=0 or " if FILL in sizes and ranks % rest == 0 else ""
    return UserError(
        f"mesh {show(sizes)} = {fixed} ranks, but {_started(ranks)}: {fill}start {fixed}"
    )


def _does_not_divide(sizes: Mapping[str, int], fixed: int, ranks: int) -> UserError:
    fixed_axes = {name: size for name, size in sizes.items() if size > 1}
    keys = ", ".join(f"mesh.{name}" for name in fixed_axes)
    return UserError(
        f"mesh {show(fixed_axes)} = {fixed} ranks, but {_started(ranks)}, which is no multiple of "
        f"{fixed}: change {keys} or start {fixed * -(-ranks // fixed)}"
    )
