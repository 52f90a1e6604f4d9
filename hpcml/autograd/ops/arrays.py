"""What operations ask of arrays: order of elements, types, range of indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpcml.autograd.halves import widened
from hpcml.backend import Array, in_order, order

if TYPE_CHECKING:
    from hpcml.autograd.record import Context

_FLOAT_VALUED = ("true_divide", "exp", "log", "sqrt", "tanh")


def contiguous(x: Array) -> Array:
    """Return x, or a copy of it if its elements do not lie in order, or may not be written.

    Compiled kernels take neither; `expand` and files mapped into memory give the second kind.
    """
    flags = x.flags
    return x if flags.c_contiguous and getattr(flags, "behaved", True) else x.copy()


def floats(x: Array) -> Array:
    """Return x contiguous; a TypeError if its elements are not floats."""
    if x.dtype.kind in "biu":
        raise TypeError(f"floats needed, not {x.dtype}: use .float()")
    return contiguous(x)


def integers(index: Array, what: str) -> Array:
    """Return `index` as int64; a TypeError if it holds anything but integers."""
    if index.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {index.dtype}")
    return contiguous(index.astype(np.int64, copy=False))


def check_indices(index: Array, count: int, what: str) -> None:
    """Raise an IndexError unless 0 <= index < count everywhere: compiled loops do not look."""
    if index.size:
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= count:
            raise IndexError(f"{what} {least if least < 0 else most} is outside 0..{count - 1}")


def same_type(ctx: Context, *names: str) -> None:
    """Raise a TypeError unless all inputs, called `names`, have one dtype, as compiled loops ask.

    float32 and 16 bits together would do, but what follows would silently take twice the memory.
    """
    first = ctx.dtypes[0]
    if any(dtype is not None and dtype != first for dtype in ctx.dtypes):
        pairs = zip(names, ctx.dtypes, strict=True)
        said = ", ".join(f"{name} of {dtype}" for name, dtype in pairs if dtype is not None)
        raise TypeError(f"{ctx.primitive.name}({said}): convert them to one type")


def promoted(name: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays of one type, by PyTorch's rule: integers take that of the floats they meet.

    Where they meet only numbers that is float32. NumPy would make float64 of them.
    """
    types = [a.dtype for a in arrays if hasattr(a, "dtype")]
    floats = [d for d in types if d.kind not in "biu"]
    if floats:
        target = np.result_type(*floats)
    elif name in _FLOAT_VALUED or any(isinstance(a, float) for a in arrays):
        target = np.dtype(np.float32)
    else:
        return arrays
    return tuple([a.astype(target, copy=False) if hasattr(a, "dtype") else a for a in arrays])


def dense(x: Array) -> Array:
    """Return x, or a copy of it if its elements do not lie side by side, in whatever order.

    A TypeError if they are not floats.
    """
    if x.dtype.kind in "biu":
        raise TypeError(f"floats needed, not {x.dtype}: use .float()")
    packed = in_order(x)
    ready = packed.flags.c_contiguous and getattr(packed.flags, "behaved", True)
    return x if ready else x.copy("K")


def flat(x: Array, like: Array) -> Array:
    """The elements of x in the order in which those of `like`, of the same shape, lie in memory."""
    if not like.flags.c_contiguous:
        x = x.transpose(order(like))
    return contiguous(x).reshape(-1)


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum `gradient` to `shape`, which broadcasts to its shape: the adjoint of broadcasting."""
    if gradient.shape == shape:
        return gradient
    gradient = widened(gradient)
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and gradient.shape[lead + i] != 1
    )
    return gradient.sum(axis=axes, keepdims=True).reshape(shape)
