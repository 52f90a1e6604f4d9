"""Batches as users give them: their size, their samples, and fields as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.autograd import Tensor
from hpcml.errors import UserError


def size_of(batch: Any) -> int:
    """Number of samples of all ranks in a batch."""
    if isinstance(batch, Mapping):
        raise UserError("a batch is a tuple of arrays, not a mapping: pass tuple(batch.values())")
    if isinstance(batch, tuple | list):
        sizes = {len(field) for field in batch}
        if len(sizes) != 1:
            raise UserError(f"batch with fields of {sorted(sizes)} samples: all must have as many")
        size = sizes.pop()
    else:
        size = len(batch)
    if size == 0:
        raise UserError("a batch of 0 samples: leave it out")
    return size


def samples_of(batch: Any, part: slice) -> Sequence[Any]:
    """The samples `part` of a batch, field by field."""
    if isinstance(batch, tuple | list):
        return [field[part] for field in batch]
    found = batch[part]
    return found if isinstance(found, tuple | list) else [found]


def as_tensor(field: Any, dtype: np.dtype[Any], device: str = "cpu") -> Tensor:
    """A field of a batch as a tensor; what is no integer or boolean in the model's type."""
    array = field if backend.is_array(field) else np.asarray(field)
    array = array if array.dtype.kind in "biu" else array.astype(dtype, copy=False)
    return Tensor(backend.to_kind(array, device))
