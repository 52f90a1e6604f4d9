"""Images as a data set: normalised, augmented, whole or a part of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.data.images.augment import Augmentation
from hpcml.data.images.source import Source, Space
from hpcml.errors import UserError

MEASURED = 1 << 24
"""Values of which mean and deviation are taken, from samples spread over the training part."""
PIECE = 1 << 20
"""How many of them are looked at together, or those of a row."""


@dataclass(frozen=True)
class Images:
    """Samples first .. first + count - 1 of a source: pairs (image, label), as float32 and int64.

    An image (C, *S) less the mean of each channel, over its deviation: `mean` and `std`, (C,). With
    an augmentation a sample depends on its number in the run, not on its index alone.
    """

    source: Source
    first: int
    count: int
    mean: Array
    std: Array
    num_classes: int
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return self.count

    @property
    def image_size(self) -> tuple[int, ...]:
        """Pixels along each dimension of all images."""
        return self.source.size

    def __getitem__(self, index: int) -> tuple[Array, Any]:
        """Return sample `index` as it is, without augmentation: image (C, *S) and its label."""
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        space, places = tuple(slice(0, n) for n in self.source.size), np.array([self.first + index])
        image = self._normal(self.source.pictures.part(self.first + index, space)[None], places)[0]
        return image, self._targets(places, places, space)[0]

    def fetch_part(
        self, indices: Array, numbers: Array, space: Space | None = None
    ) -> tuple[Array, Array]:
        """Images (n, C, *part) and labels, (n,) or (n, *part), of the samples at `indices`.

        numbers: of the samples in the whole run. space: which part of each; None for all. Equal to
        that part of the whole images, augmented or not; of mapped files no more is read.
        """
        places = indices + self.first
        return self._images(places, numbers, space), self._targets(places, numbers, space)

    def fetch_targets(self, indices: Array, numbers: Array) -> Array:
        """The labels alone, whole, of what `fetch_part` gives; no image is read."""
        return self._targets(indices + self.first, numbers, None)

    def _images(self, places: Array, numbers: Array, space: Space | None) -> Array:
        pictures, size = self.source.pictures, self.source.size
        if self.augmentation is None and space is None:
            return self._normal(pictures.take(places), places)
        part = space or tuple(slice(0, n) for n in size)
        images = []
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if self.augmentation is None:
                images.append(pictures.part(place, part))
            else:
                move = self.augmentation.move(number, size)
                images.append(move.part(partial(pictures.part, place), part))
        return self._normal(np.stack(images), places)

    def _targets(self, places: Array, numbers: Array, space: Space | None) -> Array:
        labels, size = self.source.labels, self.source.size
        if not self.source.by_pixel or (self.augmentation is None and space is None):
            return self._checked(labels[places])
        part = space or tuple(slice(0, n) for n in size)
        found = []
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if self.augmentation is None:
                found.append(labels[(place, *part)])
            else:
                move = self.augmentation.move(number, size)
                found.append(move.part(labels[place].__getitem__, part, nearest=True))
        return self._checked(np.stack(found))

    def _normal(self, images: Array, places: Array) -> Array:
        self.source.check(images, places)
        shape = (1, -1, *[1] * (images.ndim - 2))
        out = np.subtract(images, self.mean.reshape(shape), dtype=np.float32)
        out /= self.std.reshape(shape)
        return out

    def _checked(self, labels: Array) -> Array:
        """Labels as int64; those of pixels, which nobody has looked at before, must be classes."""
        if self.source.by_pixel and labels.size:
            low, high = labels.min(), labels.max()
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f'label {low if low < 0 else high} in "{self.source.names[1]}": labels must be '
                    f"0 to {self.num_classes - 1}: set data.num_classes"
                )
        return labels.astype(np.int64)


def measure(source: Source, count: int) -> tuple[Array, Array]:
    """Mean and deviation of each channel over (some of) the first `count` images, (C,) float32."""
    sums, size = np.zeros((2, source.pictures.shape[1])), 0
    for places, some in _spread(source, count):
        source.check(some, places)
        some = some.astype(np.float64)
        axes = (0, *range(2, some.ndim))
        sums += some.sum(axes), (some**2).sum(axes)
        size += some.size // some.shape[1]
    mean, square = sums / size
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _spread(source: Source, count: int) -> Iterator[tuple[Array, Array]]:
    """Some of the first `count` images, spread evenly, in pieces: their places and values.

    Of large images bands of rows, evenly spread too: no rank has room for a whole one.
    """
    _, channels, height, *others = source.pictures.shape
    row = channels * math.prod(others)
    values = row * height
    chosen = np.unique(np.linspace(0, count - 1, max(1, min(count, MEASURED // values)), dtype=int))
    if values <= PIECE:
        for some in np.array_split(chosen, max(1, len(chosen) * values // PIECE)):
            yield some, source.pictures.take(some)
        return
    rows = max(1, PIECE // row)
    starts = list(range(0, height, rows))
    if values > MEASURED:
        bands = max(1, MEASURED // (rows * row))
        starts = np.linspace(0, height - rows, bands, dtype=int).tolist()
    for place in chosen:
        for start in starts:
            space = slice(start, start + rows), *(slice(0, n) for n in others)
            yield np.array([place]), source.pictures.part(int(place), space)[None]
