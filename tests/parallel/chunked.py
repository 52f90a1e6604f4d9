"""Linear layers that communicate in chunks, and the same without chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpcml import Tensor, collectives
from hpcml.comm import Axis, Mesh
from hpcml.nn import functional as F
from hpcml.parallel.tensor.overlap import gathered_linear, scattered_linear

IN, OUT = 5, 3
Needs = tuple[bool, bool, bool]


def axis_of_all(deterministic: bool = False) -> Axis:
    return Mesh({"tp": Mesh().size}, deterministic=deterministic)["tp"]


def uneven(axis: Axis) -> list[int]:
    """Positions of each rank: 1, 2, 0, 1."""
    return [(rank + 1) % 3 for rank in range(axis.size)]


class Arrays(NamedTuple):
    """What a rank puts in: operands, and the gradient of the result."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    g: np.ndarray


def arrays(
    layer: str, batch: tuple[int, ...], axis: Axis, counts: Sequence[int],
    make: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], n: int = IN, m: int = OUT,
) -> Arrays:  # fmt: skip
    random = np.random.default_rng([len(batch), axis.rank])
    own, whole = (*batch, counts[axis.rank]), (*batch, sum(counts))
    before, after = (own, whole) if layer.startswith("gathered") else (whole, own)
    return Arrays(
        make(random, (*before, n)), make(random, (m, n)),
        make(random, (m,)) if layer == "gathered" else None, make(random, (*after, m)),
    )  # fmt: skip


def whole_numbers(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of products of them are exact in any order."""
    return random.integers(-9, 10, shape).astype(np.float64)


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def forward(
    layer: str, chunks: bool, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis,
    counts: Sequence[int],
) -> Tensor:  # fmt: skip
    if layer == "scattered":
        if chunks:
            return scattered_linear(x, weight, axis, counts)
        return collectives.reduce_scatter(F.linear(x, weight), axis, -2, counts=counts)
    if chunks:
        return gathered_linear(x, weight, bias, axis, counts)
    return F.linear(collectives.all_gather(x, axis, -2, to="R", counts=counts), weight, bias)


def results(
    layer: str, chunks: bool, given: Arrays, axis: Axis, counts: Sequence[int],
    needs: Needs = (True, True, True),
) -> tuple[list[Any], dict[str, tuple[int, ...]]]:  # fmt: skip
    """The result and the gradients of x, weight and bias, and what was sent: bytes, on the wire."""
    before = axis.ledger.snapshot()
    x, weight = Tensor(given.x * 1, needs[0]), Tensor(given.weight, needs[1])
    bias = None if given.bias is None else Tensor(given.bias, needs[2])
    out = forward(layer, chunks, x * 1, weight, bias, axis, counts)
    if out.requires_grad:
        out.backward(given.g)
    counted = (axis.ledger.snapshot() - before).get("tp", {})
    sent = {name: (count.bytes, count.bytes_sent) for name, count in counted.items()}
    leaves = (x, weight) if bias is None else (x, weight, bias)
    return [out.data, *(leaf.gradient for leaf in leaves)], sent
