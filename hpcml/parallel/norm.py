"""The norm of a gradient of which each rank has some."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    squares = storage.squares()
    if groups.sharding.stage > 0 and ordered:
        groups.shard.allreduce(squares, out=squares)
    ends = np.cumsum([bucket.grains for bucket in storage.trained])
    own = [
        (held.place(bucket.parameters[0]), _divided(bucket, groups), part)
        for bucket, part in zip(storage.trained, np.split(squares, ends[:-1]), strict=True)
        if not held.is_twin(bucket)
    ]
    if ordered:
        pieces = [piece for rank in groups.pp.allgather_object(own) for piece in rank]
        pieces.sort(key=lambda piece: piece[0])
        sums = np.array([_sum(pieces, of_parts) for of_parts in (False, True)])
    else:
        sums = np.array([_sum(own, of_parts) for of_parts in (False, True)])
        if groups.sharding.stage > 0:
            groups.shard.allreduce(sums, out=sums)
        groups.pp.allreduce(sums, out=sums)
    parts = groups.tp.allreduce(sums[1:])
    return math.sqrt(sums[0] + parts[0])


def _divided(bucket: Bucket, groups: Groups) -> bool:
    return bucket.layout.get(groups.tp.name, "").startswith("S")


def _sum(pieces: Sequence[tuple[int, bool, Array]], of_parts: bool) -> float:
    chosen = [squares for _, divided, squares in pieces if divided == of_parts]
    return float(np.concatenate(chosen).sum()) if chosen else 0.0
