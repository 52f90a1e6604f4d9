"""Attention and convolutions by cuDNN, where NVIDIA's Python frontend for it is installed.

A function here computes what the kernel of that name does and returns True, or touches nothing and
returns False: then the caller's own kernel does it. The first time that an operator is left to its
own kernel, one line says why.
"""

from __future__ import annotations

from hpcml.kernels.cuda.cudnn.attention import attention, attention_backward
from hpcml.kernels.cuda.cudnn.convolution import (
    convolve,
    convolve_input_gradient,
    convolve_weight_gradient,
)
from hpcml.kernels.cuda.cudnn.library import VARIABLE, reasons, version

__all__ = [
    "VARIABLE",
    "attention",
    "attention_backward",
    "convolve",
    "convolve_input_gradient",
    "convolve_weight_gradient",
    "reasons",
    "version",
]
