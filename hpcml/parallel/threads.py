"""How many threads a rank may use: the cores it has, divided among those who share them."""

from __future__ import annotations

import os
from typing import Any

from hpcml import backend
from hpcml.comm import Mesh
from hpcml.errors import UserError


def share(mesh: Mesh, *, keep: bool = False) -> list[dict[str, Any]]:
    """Set the threads of this rank's kernels; return host, cores and threads of every rank.

    OMP_NUM_THREADS is obeyed where it is set. Otherwise a rank takes its cores divided by the ranks
    of its node that may use the same ones, at least one. keep: leave a rank the number that it has
    been given (`backend.set_threads`). Collective, whatever each rank has been given.
    """
    mine = backend.cores()
    every = mesh.world.allgather_object((mesh.node.index, mine))
    sharing = sum(node == mesh.node.index and set(theirs) & set(mine) != set()
                  for node, theirs in every)  # fmt: skip
    given = backend.threads(default=False) if keep else 0
    said = "" if given else os.environ.get("OMP_NUM_THREADS", "")
    asked = said.partition(",")[0]  # a list is by nesting level
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise UserError(f'OMP_NUM_THREADS="{asked}" must be a positive number: mend or unset it')
    count = given or (int(asked) if asked else max(1, len(mine) // max(sharing, 1)))
    if count != given:
        backend.set_threads(count)
    return mesh.world.allgather_object(
        {"rank": mesh.rank, "host": mesh.node.host, "cores": mine, "threads": count}
    )
