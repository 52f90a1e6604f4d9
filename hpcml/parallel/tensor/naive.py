"""The way of tensor parallelism that Megatron-LM improves on, to count against.

Every weight is divided by its inputs, and so are these: the ranks' products must be summed before
anything that is not linear can follow (Shoeybi et al. 2019, section 3, the first option for the
MLP). A layer costs an all-reduce of its outputs forward and an all-gather of the gradient of its
inputs backward; between layers every rank has everything, and attention and loss are computed by
all of them alike.
"""

from __future__ import annotations

from typing import Any

from hpcml import collectives
from hpcml.autograd import Tensor
from hpcml.comm import Axis
from hpcml.nn import Embedding, Linear, Module
from hpcml.nn import functional as F
from hpcml.nn.part import blocks
from hpcml.parallel.tensor.parts import block, divide_parameter


class NaiveLinear(Module):
    """Y = X A^T + b with the columns of A, the inputs, divided: X in `I` -> Y in `I`."""

    def __init__(self, linear: Linear, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        block("inputs", linear.in_features, axis)
        cuts = blocks(linear.in_features, axis.size)
        self.counts = [end - first for first, end in cuts]
        self.weight, self.bias = linear.weight, linear.bias
        divide_parameter(self.weight, 1, [(ranges,) for ranges in cuts], axis)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        own = collectives.scatter(input, self.axis, -1, source="I", counts=self.counts)
        total = collectives.all_reduce(F.linear(own, self.weight), self.axis, to="I")
        return total if self.bias is None else total + self.bias


class NaiveEmbedding(Module):
    """Rows of a table of which every rank has some columns: tokens -> `I`, by an all-gather."""

    def __init__(self, embedding: Embedding, axis: Axis) -> None:
        super().__init__()
        self.axis, self.weight = axis, embedding.weight
        block("embedding_dim", embedding.embedding_dim, axis)
        cuts = blocks(embedding.embedding_dim, axis.size)
        self.counts = [end - first for first, end in cuts]
        divide_parameter(self.weight, 1, [(ranges,) for ranges in cuts], axis)

    def forward(self, input: Any) -> Tensor:
        """Integers (...) -> (..., embedding_dim)."""
        own = F.embedding(input, self.weight)
        return collectives.all_gather(own, self.axis, -1, to="I", counts=self.counts)
