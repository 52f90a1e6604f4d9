"""GPU kernels: CUDA C++ of this folder, compiled by NVRTC for the device at hand, and cuBLAS.

Names and arguments are those of `cpu`; arrays are CuPy's, of float32, float64, bfloat16 or float16,
with arithmetic in float32 (float64 for float64). Arrays are C-contiguous unless a kernel says
otherwise. Callers check them; a kernel does not.
"""

from __future__ import annotations

from hpcml.kernels.cuda.attention import attention, attention_backward, join_attention
from hpcml.kernels.cuda.columns import column_sums, layer_norm_weight_gradient
from hpcml.kernels.cuda.pointwise import (
    adam_update,
    block_squares,
    gelu,
    gelu_backward,
    gelu_tanh,
    gelu_tanh_backward,
    relu_backward,
    sgd_plain_update,
    sgd_update,
)
from hpcml.kernels.cuda.products import (
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    matmul,
)
from hpcml.kernels.cuda.random import dropout, random_normal, random_uniform, random_words
from hpcml.kernels.cuda.rows import (
    cross_entropy,
    cross_entropy_backward,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
)
