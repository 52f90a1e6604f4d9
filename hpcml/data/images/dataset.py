"""Images as a data set: normalised, augmented, whole or a part of each."""

from __future__ import annotations

import math
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
        return image, self._labels(places, space)[0]

    def fetch_part(
        self, indices: Array, numbers: Array, space: Space | None = None
    ) -> tuple[Array, Array]:
        """Images (n, C, *part) and labels, (n,) or (n, *part), of the samples at `indices`.

        numbers: of the samples in the whole run. space: which part of each; None for all. Equal to
        that part of the whole images, augmented or not; of mapped files no more is read.
        """
        places, size = indices + self.first, self.source.size
        if self.augmentation is None and space is None:
            images = self.source.pictures.take(places)
            return self._normal(images, places), self._labels(places, None)
        part = space or tuple(slice(0, n) for n in size)
        pictures = self.source.pictures
        if self.augmentation is None:
            cut = [pictures.part(int(place), part) for place in places]
            return self._normal(np.stack(cut), places), self._labels(places, part)
        images, targets = [], []
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            move = self.augmentation.move(number, size)
            images.append(move.part(partial(pictures.part, place), part))
            if self.source.by_pixel:
                label = self.source.labels[place]
                targets.append(move.part(label.__getitem__, part, nearest=True))
        labels = np.stack(targets) if targets else self.source.labels[places]
        return self._normal(np.stack(images), places), self._checked(labels)

    def _normal(self, images: Array, places: Array) -> Array:
        self.source.check(images, places)
        shape = (1, -1, *[1] * (images.ndim - 2))
        out = np.subtract(images, self.mean.reshape(shape), dtype=np.float32)
        out /= self.std.reshape(shape)
        return out

    def _labels(self, places: Array, part: Space | None) -> Array:
        labels = self.source.labels
        if self.source.by_pixel and part is not None:
            return self._checked(np.stack([labels[(int(place), *part)] for place in places]))
        return self._checked(labels[places])

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
    values = math.prod(source.pictures.shape[1:])
    chosen = np.unique(np.linspace(0, count - 1, max(1, min(count, MEASURED // values)), dtype=int))
    sums, size = np.zeros((2, source.pictures.shape[1])), 0
    for some in np.array_split(chosen, max(1, len(chosen) * values >> 20)):
        images = source.pictures.take(some)
        source.check(images, some)
        images = images.astype(np.float64)
        axes = (0, *range(2, images.ndim))
        sums += images.sum(axes), (images**2).sum(axes)
        size += images.size // images.shape[1]
    mean, square = sums / size
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
