"""Operators and methods of tensors, under PyTorch's names, in terms of the primitives."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcml import backend
from hpcml.autograd.mode import watched
from hpcml.autograd.ops import extremes, fused, linear, pointwise, shape

if TYPE_CHECKING:
    from hpcml.autograd.tensor import Tensor

Dims = int | tuple[int, ...] | list[int] | None


def plain(value: Any) -> Any:
    """An operand: tensors and arrays as they are, NumPy scalars as Python's (they keep no type)."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        return value.item()
    return np.asarray(value) if isinstance(value, list | tuple) else value


def array_of(value: Any) -> Any:
    """The array of a tensor; arrays and numbers as they are; lists as arrays."""
    if isinstance(value, Operators):
        return value.data
    return value if backend.is_array(value) else plain(value)


def _dims(dims: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims


def _axis(dim: int, ndim: int) -> int:
    """Dimension `dim` counted from the front."""
    if not -ndim <= dim < ndim:
        raise IndexError(f"dimension {dim} of a tensor with {ndim}: use {-ndim}..{ndim - 1}")
    return dim % ndim


class Operators:
    """What can be written with a tensor: arithmetic, reductions, movement of elements."""

    __slots__ = ()
    data: Any
    _wrap: Callable[[Any], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.data.shape  # type: ignore[no-any-return]

    # --- arithmetic -----------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return pointwise.add(self, plain(other))

    def __radd__(self, other: Any) -> Tensor:
        return pointwise.add(plain(other), self)

    def __sub__(self, other: Any) -> Tensor:
        return pointwise.sub(self, plain(other))

    def __rsub__(self, other: Any) -> Tensor:
        return pointwise.sub(plain(other), self)

    def __mul__(self, other: Any) -> Tensor:
        return pointwise.mul(self, plain(other))

    def __rmul__(self, other: Any) -> Tensor:
        return pointwise.mul(plain(other), self)

    def __truediv__(self, other: Any) -> Tensor:
        return pointwise.div(self, plain(other))

    def __rtruediv__(self, other: Any) -> Tensor:
        return pointwise.div(plain(other), self)

    def __pow__(self, other: Any) -> Tensor:
        return pointwise.power(self, plain(other))

    def __rpow__(self, other: Any) -> Tensor:
        return pointwise.power(plain(other), self)

    def __matmul__(self, other: Any) -> Tensor:
        return linear.matmul(self, plain(other))

    def __rmatmul__(self, other: Any) -> Tensor:
        return linear.matmul(plain(other), self)

    def __neg__(self) -> Tensor:
        return pointwise.neg(self)

    def __abs__(self) -> Tensor:
        return pointwise.absolute(self)

    # --- comparison: no gradient ----------------------------------------------------------------

    def __lt__(self, other: Any) -> Tensor:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> Tensor:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> Tensor:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> Tensor:
        return self._compared(operator.ge, other)

    def __eq__(self, other: Any) -> Tensor:  # type: ignore[override]
        return self._compared(operator.eq, other)

    def __ne__(self, other: Any) -> Tensor:  # type: ignore[override]
        return self._compared(operator.ne, other)

    def _compared(self, compare: Callable[[Any, Any], Any], other: Any) -> Tensor:
        return self._wrap(
            watched("compare", (self, other), lambda: compare(self.data, array_of(other)))
        )

    __hash__ = object.__hash__  # equality is element-wise, identity is what sets and dicts need

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """Position of the maximum along `dim`, or in the flattened tensor."""
        array, m = self.data, backend.xp(self.data)
        found = watched(
            "argmax", (self,), lambda: m.asarray(array.argmax(dim, keepdims=keepdim)), dim=dim,
            keepdim=keepdim,
        )  # fmt: skip
        return self._wrap(found)

    # --- functions ------------------------------------------------------------------------------

    def abs(self) -> Tensor:
        """Absolute value."""
        return pointwise.absolute(self)

    def exp(self) -> Tensor:
        """Exponential."""
        return pointwise.exp(self)

    def log(self) -> Tensor:
        """Natural logarithm."""
        return pointwise.log(self)

    def sqrt(self) -> Tensor:
        """Square root."""
        return pointwise.sqrt(self)

    def tanh(self) -> Tensor:
        """Hyperbolic tangent."""
        return pointwise.tanh(self)

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-self))."""
        return pointwise.sigmoid(self)

    def relu(self) -> Tensor:
        """max(self, 0)."""
        return pointwise.relu(self)

    def softmax(self, dim: int) -> Tensor:
        """exp(self), normalised to sum 1 along `dim`."""
        return fused.softmax(self, dim=dim)

    def log_softmax(self, dim: int) -> Tensor:
        """Logarithm of the softmax along `dim`."""
        return fused.log_softmax(self, dim=dim)

    def clamp(self, min: float | None = None, max: float | None = None) -> Tensor:
        """Limit to [min, max]; the gradient outside is 0."""
        if min is None and max is None:
            raise ValueError("clamp() needs min, max or both")

        def clip() -> Any:
            limited = self.data.clip(plain(min), plain(max))
            if self.data.dtype.kind not in "biu":  # bfloat16 and a plain number make float32
                limited = limited.astype(self.data.dtype, copy=False)
            return limited

        limited = self._wrap(watched("clamp", (self, min, max), clip))
        return pointwise.where(self, limited.data, condition=(limited == self).data)

    def masked_fill(self, mask: Any, value: float) -> Tensor:
        """`value` where `mask` holds, self elsewhere."""
        return pointwise.where(plain(value), self, condition=array_of(mask))

    def to(self, dtype: Any) -> Tensor:
        """As another type, given as such or by name ("fp32", "bf16", ...)."""
        return pointwise.cast(self, dtype=backend.dtype(dtype))

    def float(self) -> Tensor:
        """As float32."""
        return self.to("fp32")

    def double(self) -> Tensor:
        """As float64."""
        return self.to("fp64")

    # --- reductions -----------------------------------------------------------------------------

    def sum(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """Sum over `dim`, all dimensions by default."""
        return shape.sum(self, dim=dim, keepdim=keepdim)

    def mean(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """Mean over `dim`, all dimensions by default."""
        return shape.mean(self, dim=dim, keepdim=keepdim)

    def amax(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """Maximum over `dim`; equal maxima share the gradient."""
        return extremes.amax(self, dim=dim, keepdim=keepdim)

    def amin(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """Minimum over `dim`; equal minima share the gradient."""
        return extremes.amin(self, dim=dim, keepdim=keepdim)

    def max(self) -> Tensor:
        """Maximum of all elements; equal maxima share the gradient."""
        return extremes.amax(self)

    def min(self) -> Tensor:
        """Minimum of all elements; equal minima share the gradient."""
        return extremes.amin(self)

    def var(self, dim: Dims = None, *, correction: int = 1, keepdim: bool = False) -> Tensor:
        """Variance over `dim`: the sum of squared deviations by count - correction."""
        centred = self - shape.mean(self, dim=dim, keepdim=True)
        total = shape.sum(centred * centred, dim=dim, keepdim=keepdim)
        count = math.prod(self.shape) // max(total.numel(), 1)
        return total / (count - correction)

    def std(self, dim: Dims = None, *, correction: int = 1, keepdim: bool = False) -> Tensor:
        """Square root of the variance over `dim`; where that is 0 the gradient is 0."""
        variance = self.var(dim, correction=correction, keepdim=keepdim)
        constant = variance == 0
        return variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)

    # --- movement -------------------------------------------------------------------------------

    def reshape(self, *dims: Any) -> Tensor:
        """The same elements in another shape; one size may be -1."""
        return shape.reshape(self, shape=_dims(dims))

    view = reshape

    def permute(self, *dims: Any) -> Tensor:
        """Reorder the dimensions."""
        return shape.permute(self, dims=_dims(dims))

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """Exchange two dimensions."""
        ndim = len(self.shape)
        order, i, j = list(range(ndim)), _axis(dim0, ndim), _axis(dim1, ndim)
        order[i], order[j] = j, i
        return shape.permute(self, dims=tuple(order))

    @property
    def T(self) -> Tensor:
        """All dimensions in reverse order."""
        return shape.permute(self, dims=tuple(range(len(self.shape)))[::-1])

    def expand(self, *dims: Any) -> Tensor:
        """Repeat along dimensions of size 1, without a copy; -1 keeps a size."""
        return shape.expand(self, shape=_dims(dims))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Join dimensions start_dim .. end_dim into one."""
        sizes = self.shape or (1,)
        start, end = _axis(start_dim, len(sizes)), _axis(end_dim, len(sizes))
        joined = math.prod(sizes[start : end + 1])
        return shape.reshape(self, shape=(*sizes[:start], joined, *sizes[end + 1 :]))

    def unsqueeze(self, dim: int) -> Tensor:
        """Insert a dimension of size 1."""
        dim = _axis(dim, len(self.shape) + 1)
        return shape.reshape(self, shape=(*self.shape[:dim], 1, *self.shape[dim:]))

    def squeeze(self, dim: int | None = None) -> Tensor:
        """Remove dimension `dim` if its size is 1, or all such dimensions."""
        ndim = len(self.shape)
        drop = range(ndim) if dim is None else (_axis(dim, ndim or 1),)
        kept = tuple(n for i, n in enumerate(self.shape) if not (i in drop and n == 1))
        return shape.reshape(self, shape=kept)

    def __getitem__(self, index: Any) -> Tensor:
        parts = tuple(array_of(p) for p in (index if isinstance(index, tuple) else (index,)))
        return shape.getitem(self, index=parts if isinstance(index, tuple) else parts[0])

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[Tensor, ...]:
        """Cut into parts of `split_size` (the last may be smaller), or of the listed sizes."""
        dim = _axis(dim, len(self.shape))
        total = self.shape[dim]
        if isinstance(split_size, int):
            if split_size < 1:
                raise ValueError(f"split({split_size}): the size must be at least 1")
            split_size = [split_size] * max(-(-total // split_size), 1)
        elif sum(split_size) != total:
            raise ValueError(f"split({split_size}): the sizes must add up to {total}")
        lead, parts, start = (slice(None),) * dim, [], 0
        for size in split_size:
            parts.append(shape.getitem(self, index=(*lead, slice(start, start + size))))
            start += size
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        """Cut into `chunks` parts of equal size, the last possibly smaller."""
        total = self.shape[_axis(dim, len(self.shape))]
        return self.split(-(-total // chunks) if total else [0] * chunks, dim)
