"""CPU kernels for images: convolution, pooling, batch normalisation. See the package above.

Images lie channels last, (N, *S, C), with one to three spatial dimensions.
"""

from __future__ import annotations

from hpcml.kernels.cpu import jit
from hpcml.kernels.cpu.images.batch import (
    batch_moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_sums,
)
from hpcml.kernels.cpu.images.filters import (
    convolve,
    convolve_input_gradient,
    convolve_weight_gradient,
)
from hpcml.kernels.cpu.images.order import transpose
from hpcml.kernels.cpu.images.pooling import max_pool, max_pool_backward, resample

__all__ = [
    "batch_moments",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_sums",
    "convolve",
    "convolve_input_gradient",
    "convolve_weight_gradient",
    "load",
    "max_pool",
    "max_pool_backward",
    "resample",
    "transpose",
]


def load(dtype: str) -> None:
    """Make these kernels ready too, for "float32" or "float64", after those of the package."""
    jit.load(dtype)
