"""What is saved for backward, divided among ranks that would all save the same (P_a of ZeRO-R).

Ranks of tensor parallelism compute on the same inputs, so each of them saves the same activations.
Rajbhandari et al. 2019, section 6.1, let each keep a part, and gather the whole just before its use
in backward: one all-gather of each array more, 1/N of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from hpcml import memory
from hpcml.backend import Array, xp
from hpcml.comm import Axis
from hpcml.parallel.packing import Packed, packed

SMALLEST = 1 << 10
"""Elements below which an array is kept whole: the message would cost more than the memory."""


@contextmanager
def partitioned(axis: Axis, *, offload: bool = False) -> Iterator[None]:
    """Keep this rank's part of what is saved for backward inside the block.

    offload: in the memory of the host (P_a+cpu), where the parts of a GPU's arrays go and come
    back from; those of the CPU are there already.

    The arrays must be the same on all ranks of `axis`: activations in layout R or I, not those of
    different samples. Backward is then collective over `axis`.
    """
    if axis.size == 1:
        yield
        return
    with packed(lambda array: _Part.of(array, axis, offload), SMALLEST):
        yield


@dataclass(frozen=True)
class _Part(Packed):
    """This rank's elements of a flattened array, and what the whole looks like."""

    own: Array
    axis: Axis
    shape: tuple[int, ...]
    module: ModuleType
    """Where the whole is needed: of NumPy or CuPy."""

    @staticmethod
    def of(array: Array, axis: Axis, offload: bool) -> _Part:
        """Copy the elements that this rank keeps; blocks are equal, the last one filled up."""
        block = -(-array.size // axis.size)
        flat = array.reshape(-1)[axis.rank * block : (axis.rank + 1) * block]
        m = xp(array)
        if m is np or offload:
            own = memory.zeros((block,), array.dtype)
            own[: flat.size] = flat if m is np else flat.get()
        else:
            own = m.zeros((block,), array.dtype)
            own[: flat.size] = flat
        return _Part(own, axis, array.shape, m)

    def get(self) -> Array:
        """The whole, from all ranks, where it came from."""
        size = self.own.size * self.axis.size
        on_host = xp(self.own) is np
        whole = (memory if on_host else self.module).empty((size,), self.own.dtype)
        self.axis.allgather(self.own, out=whole)
        count = int(np.prod(self.shape, dtype=np.int64))
        return self.module.asarray(whole[:count].reshape(self.shape))
