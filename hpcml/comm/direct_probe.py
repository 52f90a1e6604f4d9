"""A job of two ranks that sends arrays of GPUs: `mpiexec -n 2 python -m hpcml.comm.direct_probe`.

The first rank prints a line of JSON if all has come as it was sent; see `hpcml.comm.direct`.
"""

from __future__ import annotations

import importlib
import json
import sys

SIZES = (1, 1 << 10, 1 << 16, 4 << 20)
"""Bytes: libraries send short and long messages in different ways."""


def main() -> int:
    """Send and receive; the exit code."""
    cupy = importlib.import_module("cupy")
    mpi = importlib.import_module("mpi4py.MPI")
    world = mpi.COMM_WORLD
    local = world.Split_type(mpi.COMM_TYPE_SHARED).rank
    number = local % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(number).use()
    peer = 1 - world.rank
    wrong = []
    for nbytes in SIZES:
        # From the middle of an array, as pieces of a buffer are.
        mine, other = cupy.full(nbytes + 256, world.rank + 1, "u1"), cupy.zeros(nbytes + 256, "u1")
        cupy.cuda.get_current_stream().synchronize()
        coming = world.Irecv(other[128:-128], peer)
        going = world.Isend(mine[128:-128], peer)
        mpi.Request.Waitall([coming, going])
        there = bool((other[128:-128] == peer + 1).all())
        beside = bool((other[:128] == 0).all() and (other[-128:] == 0).all())
        wrong += [] if there and beside else [nbytes]
    every = world.allgather(wrong)
    failed = sorted({nbytes for found in every for nbytes in found})
    if failed:
        sys.exit(f"messages of {', '.join(map(str, failed))} bytes came wrong")
    devices = world.allgather(number)
    if world.rank == 0:
        sys.stdout.write(json.dumps({"devices": devices}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
