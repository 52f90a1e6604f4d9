"""The matrix products of a GPT training step by themselves: the part that is a BLAS library's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpcml import backend, kernels
from hpcml.backend import Array
from hpcml.bench.rounds import Call

if TYPE_CHECKING:
    from hpcml.bench.step import Size

Shape = tuple[int, int, int, int]
"""Of a product x (rows, in) by weights (out, in): rows, in, out, and how often it occurs."""


def shapes(size: Size, vocab: int) -> list[Shape]:
    """The matrix products of a forward pass."""
    rows, c, n = size.batch * size.block, size.width, size.layers
    layer = [(rows, c, 3 * c, n), (rows, c, c, n), (rows, c, 4 * c, n), (rows, 4 * c, c, n)]
    return [*layer, (rows, c, vocab, 1)]


def ours(shapes: Sequence[Shape], precision: str = "fp32") -> Call:
    """All products of a step as `linear` calls them: forward, and both of backward.

    Those of bfloat16 in float32 where the machine has none of their own.
    """
    brain = precision == "bf16" and kernels.multiplies(backend.dtype(precision))
    calls: list[tuple[Call, int]] = []
    random = np.random.default_rng(1)
    for rows, n_in, n_out, count in shapes:
        sizes = ((rows, n_in), (n_out, n_in), (rows, n_out))
        made: list[Array] = [random.standard_normal(size, np.float32) for size in sizes]
        if brain:
            made = [a.astype(backend.dtype(precision)).view(np.uint16) for a in made]
        x, w, g = made
        k = kernels.of(x)
        calls.append((partial(k.linear, x, w, x[0, :0], np.empty_like(g)), count))
        calls.append((partial(k.linear_input_gradient, g, w, np.empty_like(x)), count))
        calls.append((partial(k.linear_weight_gradient, g, x, np.empty_like(w)), count))
    return alternating(calls)


def alternating(products: Sequence[tuple[Call, int]]) -> Call:
    """Make each call as often as it says, layer by layer rather than one product after another."""
    layers = range(max(count for _, count in products))
    order = [call for layer in layers for call, count in products if layer < count]

    def run() -> None:
        for call in order:
            call()

    return run
