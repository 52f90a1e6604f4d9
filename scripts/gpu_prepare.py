"""Does beforehand what takes long once: compiles into the caches on disk, reads what is large.

`python scripts/gpu_prepare.py cpu` compiles the kernels of the CPU, with which tests compare and
which make first values; `... float32 64` attention of this type on the GPU, in tiles of this depth;
`... torch` loads PyTorch and what it multiplies and compiles with, gigabytes that then need not be
read within the time of a contender.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np

from hpcml import backend, kernels
from hpcml.kernels.cuda import launch
from hpcml.kernels.cuda.attention import TILES, takes


def main(what: str, depth: str = "") -> None:
    """Prepare the kernels of the CPU, PyTorch, or attention of a type and a depth."""
    if what == "cpu":
        both = np.empty(0, np.float32), np.empty(0, np.float64)
        for load in kernels.of, kernels.images:  # images are asked for later
            for array in both:
                load(array)
    elif what == "torch":
        torch = importlib.import_module("torch")
        importlib.import_module("torch._inductor.compile_fx")
        square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
        (square @ square).cpu()
    elif takes(int(depth), backend.dtype(what)):
        launch.module(backend.device_module("cuda"), TILES, what, int(depth)).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
