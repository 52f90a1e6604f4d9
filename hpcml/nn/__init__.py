"""Serial layers: modules, parameters and functions under PyTorch's names."""

from hpcml.nn import functional
from hpcml.nn.attention import MultiheadAttention, PackedAttention
from hpcml.nn.layers import (
    GELU,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    ModuleList,
    MSELoss,
    ReLU,
    Sequential,
    Sigmoid,
    Tanh,
)
from hpcml.nn.module import Module
from hpcml.nn.parameter import Constant, Normal, Parameter, Uniform

__all__ = [
    "GELU",
    "Constant",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Linear",
    "MSELoss",
    "Module",
    "ModuleList",
    "MultiheadAttention",
    "Normal",
    "PackedAttention",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Tanh",
    "Uniform",
    "functional",
]
