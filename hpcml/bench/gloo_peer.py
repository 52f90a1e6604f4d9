"""PyTorch's gloo, its collectives on CPUs, among the ranks of the same job."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.bench.rounds import Call
from hpcml.comm import Mesh
from hpcml.errors import UserError


class GlooPeer:
    """`torch.distributed.all_reduce` among all ranks of a mesh. Making it is collective."""

    def __init__(self, mesh: Mesh, threads: int = 1) -> None:
        """`threads`: of PyTorch on each rank. Raises `UserError` where it is not installed."""
        try:
            import torch
            import torch.distributed as dist
        except ImportError:
            raise UserError("--peer torch needs PyTorch: install hpcml[peer]") from None
        self._torch, self._dist = torch, dist
        torch.set_num_threads(threads)
        several = len({node.index for node in mesh.nodes}) > 1
        host = mesh.node.host if several else "127.0.0.1"
        store = None
        if mesh.rank == 0:
            store = dist.TCPStore(host, 0, mesh.size, True, wait_for_workers=False)
        place = mesh.world.broadcast_object((host, store.port) if store else None)
        assert place is not None, "the first rank has made it"
        store = store or dist.TCPStore(*place, mesh.size, False)
        dist.init_process_group("gloo", store=store, rank=mesh.rank, world_size=mesh.size)

    def all_reduce(self, x: np.ndarray[Any, np.dtype[Any]]) -> Call:
        """The call that sums `x` over the ranks, in place."""
        if x.dtype.name == "bfloat16":
            tensor = self._torch.from_numpy(x.view(np.int16)).view(self._torch.bfloat16)
        else:
            tensor = self._torch.from_numpy(x)
        return lambda: self._dist.all_reduce(tensor)

    def close(self) -> None:
        """End PyTorch's process group. Collective."""
        self._dist.destroy_process_group()
