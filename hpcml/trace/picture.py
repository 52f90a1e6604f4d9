"""Timelines as pictures: ranks down, time across, what was done by colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcml import pictures
from hpcml.parallel.pipeline import Kind
from hpcml.parallel.pipeline.actions import COMPUTE
from hpcml.trace.record import Recorded
from hpcml.trace.segments import TRANSFER, WAITING, Segment, segments
from hpcml.trace.theory import Theory, theories

LOOKS = {
    Kind.FORWARD: ("forward", "#4a7ebb"),
    Kind.BACKWARD: ("backward", "#4f9d4f"),
    Kind.INPUT: ("backward, input", "#8cc98c"),
    Kind.WEIGHT: ("backward, weights", "#2f6b2f"),
    Kind.UPDATE: ("update", "#8e63b0"),
    TRANSFER: ("transfer", "#ef8a2c"),
    WAITING: ("waiting", "#d5d5d5"),
    "idle": ("idle", "#202020"),
}
"""What each kind of segment is called, and its colour: blue, green and black as is usual."""
_WIDTH, _ROW, _TITLE = 9.5, 0.32, 0.65
"""Inches of a picture, of a rank, and of a panel beyond its ranks."""
_HALF = 0.42
"""Of the height of a bar, of the way from one rank to the next."""
_NARROW = 0.09
"""Inches of a bar below which it has no room for its number."""

Row = tuple[str, Sequence[Segment]]
"""The name of a rank, and what it did."""


class Panel(NamedTuple):
    """Ranks over a time."""

    title: str
    rows: Sequence[Row]
    start: float
    """In seconds of the segments' clock."""
    seconds: float
    shown: float
    """Seconds that there is room for."""


def of_step(number: int, ranks: Sequence[Recorded]) -> list[Panel]:
    """A step as it was; below, where the ranks are a pipeline, the theory of the first one."""
    start = min(rank.start for rank in ranks)
    seconds = max(rank.end for rank in ranks) - start
    rows = [(_name(rank), did) for rank, did in zip(ranks, segments(ranks), strict=True)]
    panels = [Panel(f"step {number}: {seconds * 1e3:.1f} ms", rows, start, seconds, seconds)]
    for theory in theories(ranks)[:1]:
        title = (
            "theory: the same schedule, each action as long as its stage took on average "
            f"({theory.simulation.makespan * 1e3:.1f} ms, measured {theory.makespan * 1e3:.1f})"
        )
        panels.append(Panel(title, simulated(theory), start, seconds, seconds))
    return panels


def beside(theory: Theory, title: str, shown: float) -> list[Panel]:
    """A pipeline as it was and as it could have been, in panels for `shown` seconds."""
    ranks, simulation = theory.ranks, theory.simulation
    rows = [(_name(rank), did) for rank, did in zip(ranks, segments(ranks), strict=True)]
    found = f"{title}: {theory.makespan * 1e3:.0f} ms, bubble {theory.bubble:.1%}"
    could = f"theory: {simulation.makespan * 1e3:.0f} ms, bubble {simulation.bubble:.1%}"
    return [
        Panel(found, rows, theory.start, theory.makespan, shown),
        Panel(could, simulated(theory), theory.start, simulation.makespan, shown),
    ]


def simulated(theory: Theory) -> Sequence[Row]:
    """What the ranks of a pipeline would have done by its simulation, from the same start on."""
    rows = []
    for rank, events in zip(theory.ranks, theory.simulation.events, strict=True):
        did: list[Segment] = []
        edge = theory.start
        for (stage, kind, microbatch), *times in events:
            if kind in COMPUTE:
                start, end = (theory.start + time for time in times)
                did.append(Segment(WAITING, stage, microbatch, edge, start))
                did.append(Segment(kind, stage, microbatch, start, end))
                edge = end
        rows.append((_name(rank), did))
    return rows


def draw(panels: Sequence[Panel], path: str, columns: int = 1) -> None:
    """Draw panels into a file, from left to right and then down."""
    plt = pictures.pyplot()
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(len(panel.rows) for panel in line) * _ROW + _TITLE for line in lines]
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(_WIDTH, sum(heights) + 0.3), squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    seen = {"idle"}
    for place, panel in zip(axes.flat, panels, strict=True):
        seen |= _panel(place, panel, _WIDTH / columns)
    for place in axes[-1]:
        place.set_xlabel("ms", fontsize=8)
    shown = {name: colour for kind, (name, colour) in LOOKS.items() if kind in seen}
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in shown.values()]
    where = {"loc": "outside lower center", "ncols": len(shown), "frameon": False, "fontsize": 8}
    figure.legend(handles, shown.keys(), **where)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(place: Any, panel: Panel, inches: float) -> set[str]:
    """Draw one; the kinds that are in it."""
    width, room, seen = panel.seconds * 1e3, panel.shown * 1e3, set()
    for number, (_, did) in enumerate(panel.rows):
        place.broken_barh([(0, width)], (number - _HALF, 2 * _HALF), facecolors=LOOKS["idle"][1])
        stages = sorted({one.stage for one in did if one.stage >= 0})
        for one in did:
            left, right = ((time - panel.start) * 1e3 for time in (one.start, one.end))
            left, right = max(left, 0.0), min(right, width)
            if left >= right:
                continue
            seen.add(one.what)
            look: dict[str, Any] = {"facecolors": LOOKS[one.what][1]}
            if one.what in COMPUTE and one.microbatch >= 0:
                # Of several stages of a rank the later ones are darker, on black.
                look |= {"alpha": max(1 - 0.25 * stages.index(one.stage), 0.4)}
                if (right - left) / room * inches > _NARROW:
                    place.text((left + right) / 2, number, one.microbatch, ha="center",
                               va="center", fontsize=6.5, color="white", clip_on=True)  # fmt: skip
            place.broken_barh([(left, right - left)], (number - _HALF, 2 * _HALF), **look)
            if one.what in COMPUTE:
                edges = {"color": "white", "linewidth": 0.5}
                place.vlines([left, right], number - _HALF, number + _HALF, **edges)
    place.set_yticks(range(len(panel.rows)), [name for name, _ in panel.rows])
    place.set(xlim=(0, room), ylim=(len(panel.rows) - 0.5, -0.5))
    place.set_title(panel.title, fontsize=9, loc="left")
    place.tick_params(labelsize=8)
    return seen


def _name(rank: Recorded) -> str:
    return f"rank {rank.rank}"
