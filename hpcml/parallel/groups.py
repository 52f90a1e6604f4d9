"""The ranks that divide the model states, and those that hold the same part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcml import memory
from hpcml.backend import Array
from hpcml.comm import Axis, Mesh
from hpcml.errors import UserError
from hpcml.optim.buckets import Sharding
from hpcml.parallel.spatial.grid import NAMES


@dataclass(frozen=True)
class Groups:
    """Axes of data parallelism, and how the states are divided among them.

    dp: every data-parallel rank, and every context-parallel and spatial one, as these too have all
    parameters, and gradients of their part of the work.
    all: those whose gradients are summed; the same, unless the mode of data parallelism keeps ranks
    apart. shard: the ranks that divide one copy of the states; at
    stage 0 all of them (they divide the work of a reduction). replica: the ranks that hold the same
    part. tp: the ranks that divide tensors. pp: those of the other stages of a pipeline.
    """

    dp: Axis
    all: Axis
    shard: Axis
    replica: Axis
    tp: Axis
    pp: Axis
    sharding: Sharding
    shared: Mapping[str, Axis] = field(default_factory=dict)
    """Kinds of state on which collectives of an axis work in place, all of it at once."""

    def allocate(self, shape: tuple[int, ...], dtype: Any, kind: str, device: str = "cpu") -> Array:
        """Memory for a kind of state: shared where a collective works in place."""
        axis = self.shared.get(kind)
        if axis is not None and axis.size > 1 and device == "cpu":
            return axis.empty(shape, dtype, kind)
        return memory.empty(shape, np.dtype(dtype), kind, device)


def divide(mesh: Mesh, stage: int, ranks: int = 0, layers: bool = False) -> Groups:
    """The groups of a mesh: `ranks` divide a copy of the states (0: all). Collective."""
    names = ("dp", "cp", *NAMES)
    axis = mesh[names]
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={stage} must be 0, 1, 2 or 3")
    if ranks < 0 or (ranks and axis.size % ranks):
        fitting = [n for n in range(1, axis.size + 1) if axis.size % n == 0]
        raise UserError(
            f"zero.shard_ranks={ranks} must divide the {axis.size} data-parallel ranks: take one "
            f"of {', '.join(map(str, fitting))} (0: all)"
        )
    shard, replica = axis, Axis("dp.replica", ledger=mesh.ledger)
    if stage and ranks not in (0, axis.size):
        replica, shard = mesh.split(names, ranks, ("replica", "shard"))
    # Not the parameters: GEMM reads them all the time, and shared memory has small pages.
    in_place = ["grads"] if stage < 2 else []
    sharding = Sharding(stage, shard.size, shard.rank, layers)
    shared = dict.fromkeys(in_place, shard)
    return Groups(axis, axis, shard, replica, mesh["tp"], mesh["pp"], sharding, shared)


def apart(mesh: Mesh, shared: Iterable[str]) -> Groups:
    """Every rank for itself; the kinds in `shared` lie where all dp ranks can reduce them."""
    alone = Axis("dp.own", ledger=mesh.ledger)
    dp, in_place = mesh["dp"], dict.fromkeys(shared, mesh["dp"])
    return Groups(dp, alone, alone, alone, mesh["tp"], mesh["pp"], Sharding(), in_place)
