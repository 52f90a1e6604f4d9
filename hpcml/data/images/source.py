"""What images data are read from: samples by number, and only the part of one that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcml.backend import Array
from hpcml.errors import UserError

Space = tuple[slice, ...]
"""A part of an image: for each spatial dimension where it begins and ends."""


class Pictures(Protocol):
    """Images (N, C, *S) of which parts are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C and the spatial sizes."""
        ...

    def part(self, index: int, space: Space) -> Array:
        """Channels and a part of the pixels of an image: (C, *part)."""
        ...

    def take(self, indices: Array) -> Array:
        """Whole images: (len(indices), C, *S)."""
        ...


class InArray:
    """Images in an array (N, C, *S), possibly memory-mapped and a view of another order."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C and the spatial sizes."""
        return tuple(self.array.shape)

    def part(self, index: int, space: Space) -> Array:
        """Channels and a part of the pixels of an image; of a mapped file no more is read."""
        return self.array[(index, slice(None), *space)]

    def take(self, indices: Array) -> Array:
        """Whole images."""
        return self.array[indices]


@dataclass(frozen=True)
class Source:
    """Images and what is to be told of each: a class, or a class for every pixel.

    labels: (N,) or (N, *S), integers; a mapped file where it can be. names: of the two files (or
    folders), for errors. classes: their names, if they have any.
    """

    pictures: Pictures
    labels: Array
    names: tuple[str, str]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, _, *size = self.pictures.shape
        if min(self.pictures.shape) < 1:
            raise UserError(
                f'images "{self.names[0]}" of shape {self.pictures.shape}, as (N, C, ...): none '
                "of these can be 0"
            )
        found = self.labels.shape[0] if self.labels.ndim else "no list of"
        if found != count:
            raise UserError(
                f'"{self.names[0]}" has {count} images, but "{self.names[1]}" {found} labels: give '
                "one for each image"
            )
        if self.labels.dtype.kind not in "iu" or self.labels.shape[1:] not in ((), tuple(size)):
            raise UserError(
                f'labels "{self.names[1]}" of shape {self.labels.shape}, {self.labels.dtype}: they '
                f"must be integers, one for each image ({count},) or for each pixel "
                f"{(count, *size)}"
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial sizes of every image."""
        return self.pictures.shape[2:]

    @property
    def by_pixel(self) -> bool:
        """Whether every pixel has a label."""
        return len(self.labels.shape) > 1

    def check(self, images: Array, places: Array) -> None:
        """Raise UserError for pixels that are no numbers; places: of the images (n, ...) here."""
        if images.dtype.kind != "f" or np.isfinite(images).all():
            return
        bad = next(i for i, image in enumerate(images) if not np.isfinite(image).all())
        value = images[bad][~np.isfinite(images[bad])][0]
        raise UserError(
            f'image {int(places[bad])} (from 0) of "{self.names[0]}" has a pixel that is {value}: '
            "mend the image, or leave it out"
        )

    def count_classes(self, given: int) -> int:
        """How many classes there are: `given`, or one more than the largest label.

        Labels of images are all looked at; those of pixels only if nothing is given. Raises
        UserError for a label that is no class.
        """
        if self.by_pixel and given:
            return given
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or (given and high >= given):
            bad = low if low < 0 else high
            limit = f"below data.num_classes={given}" if given else "0 or more"
            raise UserError(f'label {bad} in "{self.names[1]}": labels must be {limit}')
        return given or max(high + 1, len(self.classes))
