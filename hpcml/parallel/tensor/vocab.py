"""Embeddings with divided tables, and those of positions (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.autograd.operators import array_of
from hpcml.backend import Array, xp
from hpcml.comm import Axis
from hpcml.nn import Embedding, Module
from hpcml.nn import functional as F
from hpcml.nn.part import Range, blocks
from hpcml.parallel.tensor.parts import block, divide_parameter
from hpcml.parallel.tensor.positions import Positions, pick


class VocabParallelEmbedding(Module):
    """Rows of a table, the table divided by rows: tokens (..., T) -> `I`, or `S(-2)`.

    A rank looks up the tokens whose rows it has and puts zeros for the others; one all-reduce of
    the result joins them, or a reduce-scatter with sequence parallelism. Backward communicates
    nothing, or an all-gather. Of tokens of whole sequences a rank takes its positions.
    """

    def __init__(
        self, embedding: Embedding, axis: Axis, *, positions: Positions | None = None
    ) -> None:
        super().__init__()
        self.axis, self.num_embeddings = axis, embedding.num_embeddings
        self.positions = positions or Positions(axis, sequence_parallel=False)
        self.mine = block("num_embeddings", embedding.num_embeddings, axis)
        self.weight = embedding.weight
        cuts = [(ranges,) for ranges in blocks(embedding.num_embeddings, axis.size)]
        divide_parameter(self.weight, 0, cuts, axis)

    def forward(self, input: Any) -> Tensor:
        """Integers (..., T) -> (..., T or this rank's positions, embedding_dim)."""
        tokens = array_of(input)
        if self.positions.divided:
            self.positions.begin(tokens.shape[-1])
            tokens = pick(tokens, self.positions.context)
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        check_range("index", tokens, self.num_embeddings)
        inside, place = places(tokens, self.mine)
        found = F.embedding(place, self.weight)
        return self.positions.leave(found * inside[..., None].astype(found.dtype))


class PositionEmbedding(Module):
    """An embedding of the positions of whole sequences, of which a rank looks up its own."""

    def __init__(self, embedding: Embedding, positions: Positions) -> None:
        super().__init__()
        self.positions, self.weight = positions, embedding.weight

    def forward(self, input: Any) -> Tensor:
        """Integers (..., T) of all positions -> (..., this rank's positions, embedding_dim)."""
        numbers = array_of(input)
        return F.embedding(pick(numbers, self.positions.own), self.weight)


def places(tokens: Array, mine: Range) -> tuple[Array, Array]:
    """Which tokens lie in a range, and their places there; 0 for the others."""
    inside = (tokens >= mine[0]) & (tokens < mine[1])
    return inside, xp(tokens).where(inside, tokens - mine[0], 0).astype(np.int64)


def check_range(what: str, numbers: Array, count: int) -> None:
    """Raise IndexError unless all are of 0 to count - 1, TypeError unless they are integers.

    Numbers on a GPU are not looked at: that would be to wait for it.
    """
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {numbers.dtype}")
    if (
        isinstance(numbers, np.ndarray)
        and numbers.size
        and not 0 <= numbers.min() <= numbers.max() < count
    ):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"{what} {wrong} is outside 0..{count - 1}")
