"""Batches: runs of global sample numbers that load a sample when it is asked for, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcml.data.core import Dataset
from hpcml.data.sampler import Sampler
from hpcml.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
Space = tuple[slice, ...]
"""A part of an image: for each spatial dimension where it begins and ends."""


class Batch:
    """The samples of one step. `len(batch)` counts those of all ranks; `batch[i:j]` loads some.

    `first` is the number of the batch's first sample in the whole run.
    """

    def __init__(self, dataset: Dataset, indices: Array, first: int) -> None:
        """A batch of the samples at `indices` (int64) of a data set."""
        self._dataset = dataset
        self._indices = indices
        self.first = first

    def __len__(self) -> int:
        """Number of samples in the batch, over all ranks."""
        return len(self._indices)

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """Pixels along each dimension of the images, where the data set knows."""
        size: tuple[int, ...] | None = getattr(self._dataset, "image_size", None)
        return size

    def __getitem__(self, part: slice) -> tuple[Array, ...]:
        """Load the samples `part` of the batch: a tuple of arrays, samples along dimension 0."""
        if not isinstance(part, slice):
            raise TypeError(f"a batch is indexed by a slice, such as batch[0:4], not by {part!r}")
        return self._load(part, None)

    def part(self, samples: slice, space: Space) -> tuple[Array, ...]:
        """Load a part of the pixels of some samples: images (n, C, *part) and what belongs to them.

        space: where the part begins and ends along each spatial dimension of the images, which are
        the first field. Fields of one value for each pixel, (n, *S), are cut likewise, others are
        whole. A data set with `fetch_part` reads no more than that, of others all is read and cut.
        """
        return self._load(samples, space)

    def targets(self, samples: slice) -> Array:
        """Load the last field alone of some samples, whole.

        A data set with `fetch_targets` reads no more than that, of others all is read.
        """
        fetch_targets = getattr(self._dataset, "fetch_targets", None)
        if fetch_targets is None:
            return self[samples][-1]
        numbers = np.arange(self.first, self.first + len(self))[samples]
        found: Array = fetch_targets(self._indices[samples], numbers)
        return found

    def _load(self, samples: slice, space: Space | None) -> tuple[Array, ...]:
        indices = self._indices[samples]
        fetch_part = getattr(self._dataset, "fetch_part", None)
        if fetch_part is not None:
            numbers = np.arange(self.first, self.first + len(self))[samples]
            return tuple(fetch_part(indices, numbers, space))
        fetch = getattr(self._dataset, "fetch", None)
        if fetch is not None:
            fields = tuple(fetch(indices))
        else:
            fields = _stack([self._dataset[int(index)] for index in indices], indices)
        return fields if space is None else _cut(fields, space)


class Batches:
    """The batches of a run, from step `first_step` on, for `steps` steps or without end.

    Step s holds the samples numbered from s * batch_size, in an order that depends on `seed` alone.
    With `seed=None` the data set is visited once, in its own order, the last batch being what is
    left (or until `steps` batches are done): for validation.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int | None,
        first_step: int = 0,
        steps: int | None = None,
    ) -> None:
        """Batches of `batch_size` samples, whatever the number of ranks."""
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: a batch needs at least 1 sample")
        self.dataset, self.batch_size, self.first_step = dataset, batch_size, first_step
        self._sampler = None if seed is None else Sampler(len(dataset), seed)
        if self._sampler is None:
            there = -(-len(dataset) // batch_size) - first_step
            steps = there if steps is None else min(steps, there)
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield `Batch` after `Batch`; nothing is loaded before it is asked for."""
        step = self.first_step
        while self.steps is None or step < self.first_step + self.steps:
            first = step * self.batch_size
            yield Batch(self.dataset, self._indices(first), first)
            step += 1

    def _indices(self, first: int) -> Array:
        if self._sampler is not None:
            return self._sampler.indices(first, first + self.batch_size)
        return np.arange(first, min(first + self.batch_size, len(self.dataset)), dtype=np.int64)


def _cut(fields: tuple[Array, ...], space: Space) -> tuple[Array, ...]:
    """Cut images (n, C, *S), the first field, and fields (n, *S)."""
    images, *others = fields
    size = images.shape[2:]
    if len(size) != len(space):
        raise UserError(
            f"a part {space} of samples of shape {images.shape[1:]}: give a slice for each "
            "dimension after the channels"
        )
    cut = [field[(slice(None), *space)] if field.shape[1:] == size else field for field in others]
    return (images[(slice(None), slice(None), *space)], *cut)


def _stack(samples: list[Any], indices: Array) -> tuple[Array, ...]:
    """Stack samples field by field. A sample that is no tuple counts as a tuple of one field."""
    rows = [sample if isinstance(sample, tuple | list) else (sample,) for sample in samples]
    fields = [[np.asarray(field) for field in row] for row in rows]
    for row, index in zip(fields, indices, strict=True):
        if [x.shape for x in row] != [x.shape for x in fields[0]]:
            raise UserError(
                f"sample {index} of the data set has fields of shapes {[x.shape for x in row]}, "
                f"sample {indices[0]} {[x.shape for x in fields[0]]}: make all samples alike"
            )
    return tuple(np.stack(column) for column in zip(*fields, strict=True))
