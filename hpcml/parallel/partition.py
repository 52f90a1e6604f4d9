"""What is saved for backward, divided among ranks that would all save the same (P_a of ZeRO-R).

Ranks of tensor parallelism compute on the same inputs, so each of them saves the same activations.
Rajbhandari et al. 2019, section 6.1, let each keep a part, and gather the whole just before its use
in backward: one all-gather of each array more, 1/N of the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hpcml import memory
from hpcml.autograd import saved_tensors_hooks
from hpcml.backend import Array
from hpcml.comm import Axis

SMALLEST = 1 << 10
"""Elements below which an array is kept whole: the message would cost more than the memory."""


@contextmanager
def partitioned(axis: Axis) -> Iterator[None]:
    """Keep this rank's part of what is saved for backward inside the block.

    The arrays must be the same on all ranks of `axis`: activations in layout R or I, not those of
    different samples. Backward is then collective over `axis`.
    """
    if axis.size == 1:
        yield
        return
    kept: dict[int, tuple[weakref.ref[Array], _Part]] = {}

    def pack(array: Array) -> Array | _Part:
        if array.size < SMALLEST:
            return array
        known = kept.get(id(array))
        if known is not None and known[0]() is array:  # several uses save one array once
            return known[1]
        part = _Part.of(array, axis)
        kept[id(array)] = weakref.ref(array), part
        return part

    def unpack(value: Array | _Part) -> Array:
        return value.gather(axis) if isinstance(value, _Part) else value

    with saved_tensors_hooks(pack, unpack):
        yield
    kept.clear()


@dataclass(frozen=True)
class _Part:
    """This rank's elements of a flattened array, and what the whole looks like."""

    own: Array
    shape: tuple[int, ...]

    @staticmethod
    def of(array: Array, axis: Axis) -> _Part:
        """Copy the elements that this rank keeps; blocks are equal, the last one filled up."""
        block = -(-array.size // axis.size)
        flat = array.reshape(-1)[axis.rank * block : (axis.rank + 1) * block]
        own = memory.zeros((block,), array.dtype)
        own[: flat.size] = flat
        return _Part(own, array.shape)

    def gather(self, axis: Axis) -> Array:
        """The whole, from all ranks."""
        whole = memory.empty((self.own.size * axis.size,), self.own.dtype)
        axis.allgather(self.own, out=whole)
        count = int(np.prod(self.shape, dtype=np.int64))
        return whole[:count].reshape(self.shape)
