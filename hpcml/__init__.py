"""hpcml: train neural networks in parallel with MPI; every technique one small, readable part."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcml import autograd, collectives, comm, data, models, nn, optim, parallel
    from hpcml.autograd import Tensor, cat, from_dlpack, maximum, minimum, no_grad, stack, where
    from hpcml.comm import Mesh, run
    from hpcml.parallel import parallelize
    from hpcml.rng import manual_seed

__version__ = "0.1.0"
__all__ = [
    "Mesh",
    "Tensor",
    "autograd",
    "cat",
    "collectives",
    "comm",
    "data",
    "from_dlpack",
    "manual_seed",
    "maximum",
    "minimum",
    "models",
    "nn",
    "no_grad",
    "optim",
    "parallel",
    "parallelize",
    "run",
    "stack",
    "where",
]

_HOMES = {
    "Mesh": "hpcml.comm",
    "Tensor": "hpcml.autograd",
    "cat": "hpcml.autograd",
    "from_dlpack": "hpcml.autograd",
    "manual_seed": "hpcml.rng",
    "maximum": "hpcml.autograd",
    "minimum": "hpcml.autograd",
    "no_grad": "hpcml.autograd",
    "parallelize": "hpcml.parallel",
    "run": "hpcml.comm",
    "stack": "hpcml.autograd",
    "where": "hpcml.autograd",
}


def __getattr__(name: str) -> Any:
    """Import on first use: compiled loops and MPI cost time that `import hpcml` should not take."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"hpcml.{name}")
    raise AttributeError(f"module 'hpcml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
