"""Which dimensions of an array ranks divide, noted beside the array: tensors carry no layout."""

from __future__ import annotations

import weakref
from typing import Any

from hpcml.backend import Array

WORDS = ("depth", "height", "width")
SAMPLES_DIM = -1

Cut = tuple[int | None, ...]
"""For each dimension of an array what ranks divide along it: 0 to 2 the depth, height and width of
images, of which they have blocks; `SAMPLES_DIM` the samples; None nothing."""


class Cuts:
    """What is known of arrays while they live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Cut]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def note(self, array: Array, cut: Cut) -> None:
        """From now on this is known of an array."""
        if cut:  # what has no dimensions may be a number
            self._known[id(array)] = weakref.ref(array), cut

    def of(self, array: Any) -> Cut | None:
        """What is known of an array; None: nothing."""
        found = self._known.get(id(array))
        return found[1] if found is not None and found[0]() is array else None


def of_space(cut: Cut | None) -> bool:
    """Whether ranks have blocks of images here."""
    return cut is not None and any(one is not None and one >= 0 for one in cut)


def shown(shape: tuple[int, ...], cut: Cut) -> str:
    """A shape as errors name it, alike on all ranks: what they divide by its name."""
    sizes = [
        str(n) if one is None else "samples" if one == SAMPLES_DIM else WORDS[one]
        for n, one in zip(shape, cut, strict=True)
    ]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
