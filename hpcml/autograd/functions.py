"""Functions of several tensors, under PyTorch's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcml.autograd.operators import array_of, plain
from hpcml.autograd.ops import extremes, pointwise, shape
from hpcml.autograd.tensor import Tensor


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Join tensors along `dim`; the other sizes must agree."""
    if not tensors:
        raise ValueError("cat([]): give at least one tensor")
    joined: Tensor = shape.cat(list(tensors), dim)
    return joined


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Join tensors of one shape along a new dimension `dim`."""
    if not tensors:
        raise ValueError("stack([]): give at least one tensor")
    return cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def where(condition: Any, input: Any, other: Any) -> Tensor:
    """`input` where `condition` holds, `other` elsewhere; all three broadcast."""
    a, b = plain(input), plain(other)
    if not (hasattr(a, "dtype") or hasattr(b, "dtype")):
        a, b = Tensor(a), Tensor(b)  # of numbers alone NumPy would make float64
    return pointwise.where(a, b, condition=array_of(condition))


def maximum(input: Any, other: Any) -> Tensor:
    """The larger of both, element by element; equal ones share the gradient."""
    return extremes.maximum(plain(input), plain(other))


def minimum(input: Any, other: Any) -> Tensor:
    """The smaller of both, element by element; equal ones share the gradient."""
    return extremes.minimum(plain(input), plain(other))
