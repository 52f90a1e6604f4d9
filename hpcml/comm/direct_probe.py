"""A job of two ranks that sends arrays of GPUs: `mpiexec -n 2 python -m hpcml.comm.direct_probe`.

The first rank prints a line of JSON if all has come as it was sent; see `hpcml.comm.direct`.
"""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np

SIZES = (1, 1 << 10, 1 << 16, 4 << 20)
"""Bytes: libraries send short and long messages in different ways."""
ROUNDS = 2
"""Libraries keep what they know of a buffer: the second time it has other values."""
_BESIDE = 128
"""Bytes before and after a message, as in the middle of a buffer."""


def values(rank: int, turn: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes of which those of another rank, time or place are others; none is 0."""
    return ((np.arange(nbytes) * 7 + 31 * turn + 101 * rank) % 251 + 1).astype(np.uint8)


def main() -> int:
    """Send and receive; the exit code."""
    cupy = importlib.import_module("cupy")
    mpi = importlib.import_module("mpi4py.MPI")
    world = mpi.COMM_WORLD
    number = world.rank % cupy.cuda.runtime.getDeviceCount()  # both ranks are on this node
    cupy.cuda.Device(number).use()
    peer = 1 - world.rank
    inside = slice(_BESIDE, -_BESIDE)
    wrong = []
    for nbytes in SIZES:
        mine, other = (cupy.empty(nbytes + 2 * _BESIDE, "u1") for _ in range(2))
        for turn in range(ROUNDS):
            mine.set(values(world.rank, turn, mine.size))
            other.set(np.zeros(other.size, np.uint8))
            cupy.cuda.get_current_stream().synchronize()
            coming = world.Irecv(other[inside], peer)
            going = world.Isend(mine[inside], peer)
            mpi.Request.Waitall([coming, going])
            expected = values(peer, turn, mine.size)
            expected[:_BESIDE] = expected[-_BESIDE:] = 0
            if nbytes not in wrong and (other.get() != expected).any():
                wrong.append(nbytes)
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
