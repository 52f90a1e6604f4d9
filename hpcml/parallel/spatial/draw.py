"""A picture of how ranks divide an image, and of what one of them reads of its neighbours."""

from __future__ import annotations

from itertools import product
from typing import Any

from hpcml import nn
from hpcml.nn.part import Range, blocks
from hpcml.parallel.spatial.geometry import Window, within

_COLOURS = ("#cfe2f3", "#d9ead3", "#fff2cc", "#f4cccc", "#d9d2e9", "#fce5cd")
_CELL = 18


def svg(
    layer: nn.Conv2d, sizes: tuple[int, int], ranks: tuple[int, int], rank: tuple[int, int]
) -> str:
    """An image (height, width) as SVG: the blocks of sp_h x sp_w ranks, one colour each.

    The pixels that `rank` (its place along height and width) gets from others for this convolution
    are dotted, those that it computes with have a frame, which goes on beyond the image where that
    is padded. As `Exchange` plans it.
    """
    reads, wanted, owns = [], [], []
    for dim, (n, count, place) in enumerate(zip(sizes, ranks, rank, strict=True)):
        padding: Any = layer.padding
        window = Window(layer.kernel_size[dim], layer.stride[dim], padding[dim],
                        layer.dilation[dim])  # fmt: skip
        reach = (window.size - 1) * window.dilation
        outputs = blocks((n + 2 * window.before - reach - 1) // window.stride + 1, count)
        wanted.append(window.reads(outputs[place]))
        reads.append(within(wanted[-1], n))
        owns.append(blocks(n, count))
    mine = [of_ranks[place] for of_ranks, place in zip(owns, rank, strict=True)]
    pixels = [
        _pixel(row, column, owns, reads, mine)
        for row, column in product(range(sizes[0]), range(sizes[1]))
    ]
    margin = _CELL * max(0, *(-low for low, _ in wanted))
    height, width = (n * _CELL + 2 * margin for n in sizes)
    frame = _frame(wanted, "#1c4587", 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin - 2} {-margin - 2} '
        f'{width + 4} {height + 4}" width="{width + 4}" height="{height + 4}">\n'
        + "\n".join([*pixels, _frame(mine, "#666666", 2), frame])
        + "\n</svg>\n"
    )


def _pixel(
    row: int, column: int, owns: list[list[Range]], reads: list[Range], mine: list[Range]
) -> str:
    owner = [
        next(place for place, (low, high) in enumerate(of_ranks) if low <= at < high)
        for at, of_ranks in zip((row, column), owns, strict=True)
    ]
    colour = _COLOURS[(owner[0] * len(owns[1]) + owner[1]) % len(_COLOURS)]
    x, y = column * _CELL, row * _CELL
    drawn = (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{colour}" stroke="#ffffff"/>'
    )
    if _inside((row, column), reads) and not _inside((row, column), mine):
        middle = _CELL / 2
        drawn += f'<circle cx="{x + middle}" cy="{y + middle}" r="3" fill="#1c4587"/>'
    return drawn


def _inside(place: tuple[int, int], ranges: list[Range]) -> bool:
    return all(low <= at < high for at, (low, high) in zip(place, ranges, strict=True))


def _frame(ranges: list[Range], colour: str, thick: int) -> str:
    (top, bottom), (left, right) = ranges
    return (
        f'<rect x="{left * _CELL}" y="{top * _CELL}" width="{(right - left) * _CELL}" '
        f'height="{(bottom - top) * _CELL}" fill="none" stroke="{colour}" stroke-width="{thick}"/>'
    )
