"""The norm of a gradient of which each rank has some."""

from __future__ import annotations

import math

import numpy as np

from hpcml.backend import Array
from hpcml.optim.buckets import Bucket
from hpcml.optim.flat import FlatStorage
from hpcml.parallel.groups import Groups
from hpcml.parallel.held import Held


def norm(storage: FlatStorage, groups: Groups, held: Held, *, ordered: bool) -> float:
    """Euclidean norm of the complete gradient of the model. Collective.

    What tensor-parallel ranks divide counts from all of them, what a pipeline divides from its
    stages, and what several ranks hold alike once. ordered: sums over grains are added up in the
    order of the parameters in the model, the same in every layout of dp, pp and ZeRO.
    """
    if not ordered:
        sums = own_squares(storage, groups, held)
        if groups.sharding.stage > 0:
            groups.shard.allreduce(sums, out=sums)
        return root(sums, groups)
    squares = storage.squares()
    if groups.sharding.stage > 0:
        groups.shard.allreduce(squares, out=squares)
    own = _pieces(storage, groups, held, squares)
    pieces = [piece for rank in groups.pp.allgather_object(own) for piece in rank]
    pieces.sort(key=lambda piece: piece[0])
    return _root(_sums(pieces), groups)


def own_squares(storage: FlatStorage, groups: Groups, held: Held) -> Array:
    """The squares of the gradient that this rank has, added up: for `root`.

    Two numbers, of what tensor-parallel ranks have alike and of what they divide.
    """
    return _sums(_pieces(storage, groups, held, storage.squares()))


def root(sums: Array, groups: Groups) -> float:
    """The norm, given the `own_squares` of each rank of a pipeline. Collective."""
    return _root(groups.pp.allreduce(sums), groups)


def _root(sums: Array, groups: Groups) -> float:
    parts = groups.tp.allreduce(sums[1:])
    return math.sqrt(sums[0] + parts[0])


Pieces = list[tuple[int, bool, Array]]
"""Of each bucket its place in the model, whether tensor-parallel ranks divide it, its squares."""


def _pieces(storage: FlatStorage, groups: Groups, held: Held, squares: Array) -> Pieces:
    ends = np.cumsum([bucket.grains for bucket in storage.trained])
    return [
        (held.place(bucket.parameters[0]), _divided(bucket, groups), part)
        for bucket, part in zip(storage.trained, np.split(squares, ends[:-1]), strict=True)
        if not held.is_twin(bucket)
    ]


def _divided(bucket: Bucket, groups: Groups) -> bool:
    return bucket.layout.get(groups.tp.name, "").startswith("S")


def _sums(pieces: Pieces) -> Array:
    found = []
    for of_parts in (False, True):
        chosen = [squares for _, divided, squares in pieces if divided == of_parts]
        found.append(np.concatenate(chosen).sum() if chosen else 0.0)
    return np.array(found)
