"""A serial tensor beside what each rank of a mesh has of it, or should have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.nn.part import Range, blocks
from hpcml.parallel.spatial import NAMES
from hpcml.train.watch import Event, Place

FLOOR = 1e-2
"""Of the largest value of a stage, what a tensor's own is at least taken to be: the gradient of a
bias that softmax cancels, say, is zero but for rounding, which no two layouts share."""


@dataclass
class Item:
    """A tensor of the serial run, and what this rank has of it in the parallel one."""

    serial: Array
    parallel: Array | None
    """None if it was not there."""
    maker: str
    """The module that computed it."""
    place: Place | None = None
    """Where a rank may have a part, which part; None where each rank should have the whole."""
    bias: Array | None = None
    """What was added last, by features."""
    elsewhere: bool = False
    """Whether another stage of a pipeline may have computed it."""


class Print(NamedTuple):
    """A few numbers of an array, by which ranks tell whether they hold the same."""

    size: float
    """Of all elements together, to which differences are relative."""
    total: float
    mixed: float

    @staticmethod
    def of(array: Array, least: float = 0.0) -> Print:
        """Of any array; `least`: what counts as the size of an element that is smaller."""
        flat = np.asarray(array, np.float64).reshape(-1)
        size = np.maximum(np.abs(flat), least).sum()
        weights = np.cos(np.arange(flat.size))
        return Print(float(size), float(flat.sum()), float(flat @ weights))

    def like(self, other: Print, tolerance: float) -> bool:
        """Whether both are of the same values, but for rounding; or neither of numbers."""
        mine, theirs = math.isfinite(self.size), math.isfinite(other.size)
        if not (mine and theirs):
            return mine == theirs
        most = tolerance * max(self.size, other.size)
        return all(abs(a - b) <= most for a, b in zip(self, other, strict=True))


class Mark(NamedTuple):
    """What a rank says of an item."""

    off: float
    """Largest difference, relative to the largest serial value."""
    serial: Print
    parallel: Print | None
    """Where this rank should have the whole."""
    maker: str
    note: str = ""
    """What is wrong besides values."""


class Row(NamedTuple):
    """What all ranks say of an item."""

    off: float
    marks: list[Mark | None]
    """By rank; None where a rank has computed nothing."""
    apart: list[str]
    """The axes along which the serial run itself is not the same."""


def marks(items: Mapping[Event, Item], mesh: Mesh) -> dict[Event, Mark | None]:
    """What this rank says of the items of a stage; None of what is not its to say."""
    most = max((_largest(item.serial) for item in items.values()), default=0.0)
    return {
        event: None if item.elsewhere else _mark(item, mesh, FLOOR * most)
        for event, item in items.items()
    }


def rows(found: Mapping[Event, Mark | None], mesh: Mesh, tolerance: float) -> dict[Event, Row]:
    """What all ranks say, in the order of the first. Collective."""
    every = mesh.world.allgather_object(found)
    table = {}
    for event in every[0]:
        of_ranks = [marks.get(event) for marks in every]
        if not any(of_ranks):  # a module that a pipeline does not call, but its links
            continue
        prints = [mark and mark.serial for mark in of_ranks]
        off = max(mark.off for mark in of_ranks if mark)
        table[event] = Row(off, of_ranks, differing(mesh, prints, together(event, mesh), tolerance))
    return table


def large(mesh: Mesh) -> list[str]:
    """The axes of more than one rank, but for a pipeline's: its ranks have nothing in common."""
    return [name for name, size in mesh.sizes.items() if size > 1 and name != "pp"]


def together(event: Event, mesh: Mesh) -> list[str]:
    """The axes along which ranks work on the same: activations are of each dp rank's samples."""
    by_samples = event.stage in ("forward", "backward")
    return [name for name in large(mesh) if name != "dp" or not by_samples]


def groups(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Axes, and products of axes."""
    for count in range(1, len(names) + 1):
        yield from combinations(names, count)


def differing(
    mesh: Mesh, prints: Sequence[Print | None], names: Sequence[str], tolerance: float
) -> list[str]:
    """The axes along which ranks, alike in all other coordinates, do not hold the same."""
    places = [mesh.grid.coords(rank) for rank in range(mesh.size)]

    def differ(a: int, b: int) -> bool:
        mine, theirs = prints[a], prints[b]
        return mine is not None and theirs is not None and not mine.like(theirs, tolerance)

    def neighbours(name: str) -> Iterator[tuple[int, int]]:
        for a, b in combinations(range(mesh.size), 2):
            if all((places[a][axis] == places[b][axis]) == (axis != name) for axis in mesh.sizes):
                yield a, b

    return [name for name in names if any(differ(a, b) for a, b in neighbours(name))]


# --- one item on one rank -----------------------------------------------------------------------


def _mark(item: Item, mesh: Mesh, least: float) -> Mark:
    own = Print.of(item.serial, least)
    if item.parallel is None:
        return Mark(np.inf, own, None, item.maker, "it was computed serially only")
    part = part_of(item, mesh)
    if part is None:
        names = [name for name in large(mesh) if name != "dp"]
        along = f" along {', '.join(names)}" if names else ""
        shapes = f"shape {item.parallel.shape} is no part of {item.serial.shape}"
        return Mark(np.inf, own, None, item.maker, shapes + along)
    same = item.parallel.shape == item.serial.shape
    whole = Print.of(item.parallel, least) if same else None
    scale = max(_largest(item.serial), least)
    return Mark(distance(item.parallel, part) / (scale or 1.0), own, whole, item.maker)


def part_of(item: Item, mesh: Mesh, values: Array | None = None) -> Array | None:
    """What this rank should have of an item (or of other values of its shape); None: no part fits.

    Where several parts have the right shape, the one that is nearest to what the rank has.
    """
    assert item.parallel is not None
    if item.parallel.shape == item.serial.shape:
        return item.serial if values is None else values
    if item.place is None:
        return None
    found = list(_indices(item.serial.shape, item.parallel.shape, item.place, mesh))
    if not found:
        return None
    best = min(found, key=lambda index: distance(item.parallel, item.serial[index]))
    return (item.serial if values is None else values)[best]


def distance(a: Array, b: Array) -> float:
    """The largest difference; infinite if anything is no number."""
    most = _largest(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return most if np.isfinite(most) else np.inf


def _largest(array: Array) -> float:
    return float(np.abs(np.asarray(array, np.float64)).max(initial=0.0))


def _indices(
    whole: tuple[int, ...], own: tuple[int, ...], place: Place, mesh: Mesh
) -> Iterator[tuple[Any, ...]]:
    """Where a part of this shape may lie."""
    if len(whole) != len(own):
        return
    choices: list[list[Sequence[int]]] = []
    for dim, (n, size) in enumerate(zip(whole, own, strict=True)):
        if n == size:
            choices.append([range(n)])
            continue
        fitting = [one for one in _along(dim, dim - len(whole), n, place, mesh) if len(one) == size]
        choices.append(fitting)
    for chosen in product(*choices):
        yield np.ix_(*chosen)


def _along(dim: int, from_end: int, n: int, place: Place, mesh: Mesh) -> Iterator[Sequence[int]]:
    """The elements along one dim that a rank may have: of features, positions, heads or space."""
    if from_end == -1 and place.features[0] == n:
        yield _spread(place.features[1], 0, n, n)
    if from_end == -2 and place.length and n % place.length == 0:  # rows may be (B T, features)
        for ranges in (place.own, place.context):
            yield _spread(ranges, 0, n, place.length)
    if dim == 0 and place.samples is not None:
        yield range(*place.samples)
    for axis in (mesh[name] for name in ("tp", *NAMES)):
        if dim > 0 and axis.size > 1:
            yield range(*blocks(n, axis.size)[axis.rank])


def _spread(ranges: Sequence[Range], start: int, stop: int, step: int) -> list[int]:
    """The elements of ranges, again in each `step` from start to stop."""
    return [at + i for at in range(start, stop, step) for first, end in ranges
            for i in range(first, end)]  # fmt: skip
