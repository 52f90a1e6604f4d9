"""What a rank refuses of samples that others do not have: all ranks come to refuse it.

Where ranks do not wait for each other in forward and backward, one that raised would leave the
others waiting for its share of the loss. So it gives shares that are no numbers, and from these all
know that there is something to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.errors import UserError


class Refusals:
    """A rank's own refusal, from where it came up to where all ranks meet."""

    def __init__(self) -> None:
        self._own: tuple[type[UserError], str] | None = None

    @contextmanager
    def kept(self, alone: Callable[[], bool]) -> Iterator[None]:
        """Within, what is refused is kept until `tell`, after which sums must not be numbers.

        Of several the first, and of that the words: its traceback holds all that was computed.

        alone: whether no rank waits for another within, asked when one has refused; else all come
        to refuse the same, or the job ends.
        """
        try:
            yield
        except UserError as error:
            if not alone():
                raise
            self._own = self._own or (type(error), str(error))

    def tell(self, axis: Axis, sums: Array) -> None:
        """Raise what a rank of the axis has refused, given sums over these. Collective."""
        if np.isfinite(sums).all():
            return
        mine, self._own = self._own, None
        for found in axis.allgather_object(mine):
            if found is not None:
                kind, message = found
                raise kind(message)
