"""What is saved for backward, exchanged for something that can give it back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpcml.autograd import saved_tensors_hooks
from hpcml.backend import Array


class Packed(ABC):
    """What stands for an array."""

    @abstractmethod
    def get(self) -> Array:
        """The array, of the same shape and type."""


@contextmanager
def packed(pack: Callable[[Array], Packed], smallest: int) -> Iterator[None]:
    """Within, exchange what is saved by `pack`, once where several uses save the same array.

    smallest: elements below which an array stays as it is.
    """
    known: dict[int, tuple[weakref.ref[Array], Packed]] = {}

    def exchange(array: Array) -> Array | Packed:
        if array.size < smallest:
            return array
        before = known.get(id(array))
        if before is not None and before[0]() is array:
            return before[1]
        made = pack(array)
        known[id(array)] = weakref.ref(array), made
        return made

    def back(value: Array | Packed) -> Array:
        return value.get() if isinstance(value, Packed) else value

    with saved_tensors_hooks(exchange, back):
        yield
    known.clear()
