"""Why a tensor of the parallel run may differ from the serial one, by what the ranks have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.train.compare import (
    Item,
    Row,
    differing,
    distance,
    groups,
    large,
    part_of,
    together,
)
from hpcml.train.watch import LOSS, MODEL, Event

_DEPENDS = {
    "first values": "they depend on the rank along {}: make them from the seed and the name",
}
_DEPENDS_OTHERWISE = (
    "the serial run itself depends on the rank along {}: by its data, or by how the model was made"
)
_MISSING = {"update": "a gather over {} is missing (each rank has only what it updated itself)"}
_MISSING_OTHERWISE = "a reduction over {} is missing (the ranks' values add up to the serial ones)"
_RATIOS = {
    1.0: "{ratio} = {axes}: a reduction over {axes} is doubled",
    -1.0: "{ratio} = 1/{axes}: divided by the ranks of {axes} once too often, or counted by one of "
    "them only",
    2.0: "{ratio} = {axes} squared: two reductions over {axes} are doubled",
    -2.0: "{ratio} = 1/{axes} squared: divided by the ranks of {axes} twice too often",
}
"""What it means that values are that power of a number of ranks times the serial ones."""
_NORM_RATIOS = {
    0.5: "{ratio} = sqrt({axes}): squares are added up over {axes} of what every rank has whole",
    -0.5: "{ratio} = 1/sqrt({axes}): squares of parts are not added up over {axes}",
    **_RATIOS,
}


class Cause(NamedTuple):
    """What is likely to be wrong."""

    text: str
    axes: list[str]
    """It concerns these, or one of these."""
    ratio: float | None = None
    """Of the parallel values to the serial ones, on the rank that is farthest off; None if these
    are all zero, or no numbers."""


class _Fit(NamedTuple):
    """What one rank says of values beside others."""

    ratio: float
    straight: bool
    """Whether they are this ratio times the others, element by element."""
    sums: dict[tuple[str, ...], bool]
    """Whether the values of all ranks add up to the others, by axes."""


class _Fits(NamedTuple):
    """What one rank says of an item."""

    plain: _Fit
    without_bias: _Fit | None
    """Of what there was before the bias was added."""
    excess: _Fit | None
    """Of the difference from the serial values, beside the bias."""


def explain(event: Event, item: Item | None, row: Row, mesh: Mesh, tolerance: float) -> Cause:
    """The likely cause, the same on all ranks. Collective.

    item: what this rank has, None if nothing. row: what all ranks say of it.
    """
    if row.apart:
        text = _DEPENDS.get(event.stage, _DEPENDS_OTHERWISE)
        return Cause(text.format(", ".join(row.apart)), row.apart)
    names = together(event, mesh)
    note = next((mark.note for mark in row.marks if mark and mark.note), "")
    if note:
        return Cause(note, names)
    whole = all(mark.parallel is not None for mark in row.marks if mark)
    prints = [mark and mark.parallel for mark in row.marks]
    split = differing(mesh, prints, names, tolerance) if whole else []
    near = min(max(10 * tolerance, 1e-6), 0.05)  # ratios must be told from each other
    mine = None if item is None or item.elsewhere else _fits(item, mesh, list(groups(split)), near)
    every = mesh.world.allgather_object(mine)
    wrong = [fits for fits, mark in zip(every, row.marks, strict=True)
             if fits and mark and mark.off > tolerance]  # fmt: skip
    worst = every[int(np.argmax([mark.off if mark else -1.0 for mark in row.marks]))]
    found = next(_by_values(event, wrong, mesh, near), None)
    if found is None and split:
        axes = ", ".join(split)
        found = Cause(f"ranks along {axes} hold different values where all should be alike", split)
    if found is None:
        over = f": look at what is exchanged over {', '.join(names)} there" if names else ""
        found = Cause(f"not explained by a ratio{over}", names)
    assert worst is not None
    ratio = worst.plain.ratio
    return found._replace(ratio=ratio if np.isfinite(ratio) else None)


def _by_values(event: Event, wrong: Sequence[_Fits], mesh: Mesh, near: float) -> Iterator[Cause]:
    """What the values of the ranks that are off have in common."""
    for fits in ([one.plain for one in wrong], [one.without_bias for one in wrong]):
        known = [fit for fit in fits if fit is not None]
        for axes in known[0].sums if known else ():
            if all(fit.sums[axes] for fit in known):
                text = _MISSING.get(event.stage, _MISSING_OTHERWISE)
                yield Cause(text.format("*".join(axes)), list(axes))
        yield from _by_ratio(event, known, mesh, near)
    excess = _common([one.excess for one in wrong if one.excess], near)
    for axes in groups(together(event, mesh)):
        if excess is not None and abs(excess + 1 - _size(axes, mesh)) <= near:
            label = "*".join(axes)
            yield Cause(f"the bias is added once by each rank of {label}, before the sum", [*axes])


def _by_ratio(event: Event, fits: Sequence[_Fit], mesh: Mesh, near: float) -> Iterator[Cause]:
    """What it means that the values of all are one multiple of the serial ones, if they are."""
    ratio = _common(fits, near)
    if ratio is None:
        return
    # The loss counts by samples: the number of data-parallel ranks may be in it by mistake.
    ends = event.stage == "backward" and event.layer.startswith((LOSS, MODEL))
    names = large(mesh) if ends else together(event, mesh)
    for power, text in (_NORM_RATIOS if event.stage == "norm" else _RATIOS).items():
        fitting = [axes for axes in groups(names)
                   if abs(ratio / _size(axes, mesh) ** power - 1) <= near]  # fmt: skip
        if fitting:
            labels = " or ".join("*".join(axes) for axes in fitting)
            concerned = [name for name in names if any(name in axes for axes in fitting)]
            yield Cause(text.format(ratio=f"{ratio:.2f}", axes=labels), concerned)
    yield Cause(f"all values are {ratio:.4g} times the serial ones", together(event, mesh))


def _common(fits: Sequence[_Fit], near: float) -> float | None:
    """The ratio, if there is one that is that of all."""
    ratios = [fit.ratio for fit in fits if fit.straight]
    if not ratios or len(ratios) < len(fits):
        return None
    return ratios[0] if max(ratios) - min(ratios) <= near * abs(ratios[0]) else None


def _size(axes: Sequence[str], mesh: Mesh) -> int:
    return prod(mesh.sizes[name] for name in axes)


def _fits(item: Item, mesh: Mesh, add: Sequence[tuple[str, ...]], near: float) -> _Fits:
    """What this rank says; `add`: axes over which to try a sum. Collective over these."""
    part = part_of(item, mesh)
    assert part is not None and item.parallel is not None
    mine, serial = np.asarray(item.parallel, np.float64), np.asarray(part, np.float64)
    plain = _fit(mine, serial, mesh, add, near)
    if item.bias is None:
        return _Fits(plain, None, None)
    bias = part_of(item, mesh, np.broadcast_to(item.bias, item.serial.shape))
    assert bias is not None
    without = _fit(mine - bias, serial - bias, mesh, add, near)
    return _Fits(plain, without, _fit(mine - serial, bias, mesh, (), near))


def _fit(
    mine: Array, serial: Array, mesh: Mesh, add: Sequence[tuple[str, ...]], near: float
) -> _Fit:
    with np.errstate(all="ignore"):  # what is no number fits nothing
        most, square = float(np.abs(serial).max(initial=0.0)), float((serial * serial).sum())
        ratio = float((mine * serial).sum()) / square if square else np.nan
        straight = distance(mine, ratio * serial) <= near * most * max(abs(ratio), 1.0)
        totals = {axes: mesh[axes].allreduce(np.ascontiguousarray(mine)) for axes in add}
    sums = {axes: distance(total, serial) <= near * most for axes, total in totals.items()}
    return _Fit(ratio, straight, sums)
