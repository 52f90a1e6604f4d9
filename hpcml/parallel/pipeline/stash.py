"""Versions of weights that are kept for microbatches under way (PipeDream 2019, section 3.3)."""

from __future__ import annotations

from hpcml import memory
from hpcml.backend import Array
from hpcml.optim.flat import FlatStorage


class Stash:
    """The parameters of a rank in as many versions as microbatches still need.

    A version is the number of updates that have made it, from 0. An update goes into a copy, and
    what it would have overwritten stays where it is: a record of backward finds there the
    parameters, and whatever else it has kept a view of.
    """

    def __init__(self, storage: FlatStorage) -> None:
        self._storage = storage
        self.newest = self._shown = 0
        self._kept: dict[int, Array] = {}

    def show(self, version: int) -> None:
        """Let the parameters have the values of a version."""
        if version != self._shown:
            newest = version == self.newest
            self._storage.show(self._storage.data if newest else self._kept[version])
            self._shown = version

    def advance(self, oldest: int) -> None:
        """Show the parameters to be updated; of the versions until now keep those from `oldest` on.

        Memory of one that nobody needs any more is used for the copy.
        """
        self.show(self.newest)
        storage = self._storage
        over = [self._kept.pop(version) for version in list(self._kept) if version < oldest]
        if oldest <= self.newest:
            like = storage.data
            copy = over.pop() if over else memory.empty(like.shape, like.dtype, "params")
            copy[...] = like
            self._kept[self.newest] = like
            storage.move(copy)
        self.newest += 1
        self._shown = self.newest
