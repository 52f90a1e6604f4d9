"""Augmentation: each sample moved a little, by numbers that depend on its place in the run.

A move says for every pixel of the result where it comes from. So a part of a moved image needs a
part of the image only, and is that part of the whole moved image to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from hpcml import rng
from hpcml.backend import Array
from hpcml.data.images.source import Space

_DRAWS = 8  # random numbers of a sample, of which a move takes two and one for each dimension

Read = Callable[[Space], Array]
"""From a part of an image to its pixels (..., *part)."""


@dataclass(frozen=True)
class Move:
    """An image turned about its centre, mirrored left and right, and shifted.

    Where the result has pixels from outside of the image, they are 0. angle: in radians, in the
    plane of the last two dimensions. shift: pixels along each dimension.
    """

    size: tuple[int, ...]
    mirrored: bool
    shift: tuple[int, ...]
    angle: float

    def part(self, read: Read, space: Space, *, nearest: bool = False) -> Array:
        """A part of the moved image; `read` gives parts of the image (..., *S).

        Turned pixels are interpolated between four, or the `nearest` is taken, as labels need.
        """
        overlaps = [_overlap(*one) for one in zip(self.size, self.shift, space, strict=True)]
        wanted, kept = (list(both) for both in zip(*overlaps, strict=True))
        if self.angle:
            plane = [self._axis(dim, space[dim]) for dim in (-2, -1)]
            found = self._turned(read, wanted[:-2], plane, nearest)
            kept[-2:] = [slice(None)] * 2
        else:
            one, n = wanted[-1], self.size[-1]
            if self.mirrored:
                wanted[-1] = slice(n - one.stop, n - one.start)
            found = read(tuple(wanted))
            found = found[..., ::-1] if self.mirrored else found
        shape = tuple(one.stop - one.start for one in space)
        out = np.zeros((*found.shape[: -len(space)], *shape), found.dtype)
        out[(..., *kept)] = found
        return out

    def _axis(self, dim: int, one: slice) -> Array:
        """How far from the centre pixels of the result were along a dimension before the turn."""
        places = np.arange(one.start, one.stop) - self.shift[dim] - (self.size[dim] - 1) / 2
        return -places if self.mirrored and dim == -1 else places

    def _turned(self, read: Read, outer: list[slice], plane: list[Array], nearest: bool) -> Array:
        """Pixels of the turned image at places of the plane of the last two dimensions."""
        down, right = plane[0][:, None], plane[1][None, :]
        sin, cos = math.sin(self.angle), math.cos(self.angle)
        turned = (cos * down - sin * right, sin * down + cos * right)
        size = self.size[-2:]
        y, x = (one + (n - 1) / 2 for one, n in zip(turned, size, strict=True))
        low = [np.floor(one + (0.5 if nearest else 0)).astype(np.int64) for one in (y, x)]
        ends = [(int(i.min()), int(i.max()) + 2) for i in low]
        box = [slice(*np.clip(pair, 0, n)) for pair, n in zip(ends, size, strict=True)]
        found = read((*outer, *box))
        kind = found.dtype if nearest else np.dtype(np.float32)
        out = np.zeros((*found.shape[:-2], *y.shape), kind)
        for corner in [(0, 0)] if nearest else product((0, 1), repeat=2):
            i, j = (one + step for one, step in zip(low, corner, strict=True))
            inside = (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])
            values = found[..., i[inside] - box[0].start, j[inside] - box[1].start]
            if not nearest:
                share = (1 - abs(y - i)) * (1 - abs(x - j))
                values = values * share[inside].astype(np.float32)
            out[..., inside] += values
        return out


def _overlap(n: int, shift: int, one: slice) -> tuple[slice, slice]:
    """Which of n pixels fall into a part when they are shifted, and where in the part."""
    low, high = np.clip((one.start - shift, one.stop - shift), 0, n)
    start = int(low) + shift - one.start
    return slice(int(low), int(high)), slice(start, start + int(high - low))


@dataclass(frozen=True)
class Augmentation:
    """Random moves: sample `number` of the run has always the same one, on whatever rank.

    flip: half of the samples are mirrored. shift: up to so many pixels either way along each
    dimension, which is a random crop after padding by as many. rotate: degrees either way.
    """

    seed: int
    flip: bool = False
    shift: int = 0
    rotate: float = 0.0

    def move(self, number: int, size: tuple[int, ...]) -> Move:
        """The move of a sample of this size."""
        draws = np.empty(_DRAWS)
        rng.uniform(rng.key(self.seed, "augmentation"), number * _DRAWS, draws)
        shift = np.floor(draws[2 : 2 + len(size)] * (2 * self.shift + 1)).astype(int) - self.shift
        angle = math.radians((2 * draws[1] - 1) * self.rotate)
        return Move(size, self.flip and draws[0] < 0.5, tuple(shift.tolist()), angle)
