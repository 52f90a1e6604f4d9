"""Compiles what takes longest, into the caches on disk that parts of the check read.

`python scripts/gpu_compile.py cpu` for the kernels of the CPU, with which tests compare and which
make first values; `... float32 64` for attention of this type on the GPU, in tiles of this depth.
"""

from __future__ import annotations

import sys

import numpy as np

from hpcml import backend, kernels
from hpcml.kernels.cuda import launch
from hpcml.kernels.cuda.attention import TILES, takes


def main(what: str, depth: str = "") -> None:
    """Compile the kernels of the CPU, or attention of a type and a depth."""
    if what == "cpu":
        both = np.empty(0, np.float32), np.empty(0, np.float64)
        for load in kernels.of, kernels.images:  # images are asked for later
            for array in both:
                load(array)
    elif takes(int(depth), backend.dtype(what)):
        launch.module(backend.device_module("cuda"), TILES, what, int(depth)).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
