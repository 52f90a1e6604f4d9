"""CPU kernels compiled by numba: `load(dtype)` first, then call them like functions.

The modules `halves`, `running`, `shared` and `staged` serve communication between processes, which
has no counterpart on other devices; `brain` has what is computed with bfloat16 as it is. Arrays are
C-contiguous unless a kernel says otherwise. Callers check them; a kernel does not. What a kernel
only reads may be read-only, as memory-mapped data are.
"""

from __future__ import annotations

from hpcml import backend
from hpcml.kernels.cpu import blas, brain, halves, jit, running, shared, staged
from hpcml.kernels.cpu.attention import attention, attention_backward, join_attention
from hpcml.kernels.cpu.pointwise import (
    adam_update,
    block_squares,
    column_sums,
    gelu,
    gelu_backward,
    gelu_tanh,
    gelu_tanh_backward,
    relu_backward,
    sgd_plain_update,
    sgd_update,
)
from hpcml.kernels.cpu.products import (
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    matmul,
)
from hpcml.kernels.cpu.random import dropout, random_normal, random_uniform, random_words
from hpcml.kernels.cpu.rows import (
    cross_entropy,
    cross_entropy_backward,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
    layer_norm_weight_gradient,
)


def load(dtype: str) -> None:
    """Make the kernels for "float32" or "float64" ready, from disk or compiled once a machine."""
    backend.keep_freed_memory()
    blas.register()
    jit.load(dtype)
