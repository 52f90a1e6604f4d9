"""Tensor parallelism: layers whose weights the ranks of an axis divide (Megatron-LM).

Shoeybi et al. 2019, section 3. A column-parallel layer divides its outputs, a row-parallel one its
inputs: one after the other they need a single sum over the ranks, and what lies between them, as
long as it is element by element or head by head, needs none. Each layer is made of a serial one and
keeps its parameters, names and first values; a rank has the part of a weight that it multiplies by.

    column = ColumnParallelLinear(mlp.c_fc, axis)
    row = RowParallelLinear(mlp.c_proj, axis)
    y = row(gelu(column(x)))  # the same on all ranks, as x is

States are those of `hpcml.collectives`: x is `I`, what lies between is `S(-1)`, y is `I`. With
sequence parallelism (Korthikanti et al. 2022, section 4.2.2) x and y are `S(-2)`: `Positions`.

Convolutions are divided likewise by filters and by channels (`convolutions`).

`divide` does it to a whole model that declares its `splits`.
"""

from hpcml.parallel.tensor.attention import ParallelAttention
from hpcml.parallel.tensor.convolutions import ColumnParallelConv, RowParallelConv
from hpcml.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from hpcml.parallel.tensor.loss import VocabParallelCrossEntropyLoss, vocab_parallel_cross_entropy
from hpcml.parallel.tensor.positions import Positions
from hpcml.parallel.tensor.recipe import TensorDivision, divide
from hpcml.parallel.tensor.vocab import VocabParallelEmbedding

__all__ = [
    "ColumnParallelConv",
    "ColumnParallelLinear",
    "ParallelAttention",
    "Positions",
    "RowParallelConv",
    "RowParallelLinear",
    "TensorDivision",
    "VocabParallelCrossEntropyLoss",
    "VocabParallelEmbedding",
    "divide",
    "vocab_parallel_cross_entropy",
]
