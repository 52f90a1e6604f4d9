"""The tensor: an array, and the use of a primitive that made it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.autograd.halves import widened
from hpcml.autograd.operators import Operators
from hpcml.autograd.primitives import Primitive
from hpcml.autograd.record import Context, apart, empty
from hpcml.backend import Array


class Tensor(Operators):
    """An n-dimensional array that remembers how it was computed.

    `Tensor(data)` takes an array (kept, not copied), a tensor, a number or nested lists (float32
    unless all integers); operators, methods and names are PyTorch's.
    """

    __slots__ = ("__weakref__", "_array", "ctx", "grad_hooks", "gradient", "gradient_buffer",
                 "requires_grad")  # fmt: skip
    __array_priority__ = 1000  # NumPy leaves `array * tensor` to us
    is_parameter = False
    unit: Any = None  # of a parameter: with what it is gathered, if it is sharded

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if type(data) is not np.ndarray and not backend.is_array(data):
            data = _array(data)
        self._array: Array | None = data
        if requires_grad and data.dtype.kind in "biu":
            raise TypeError(f"requires_grad=True for {data.dtype}: only floats have gradients")
        self.requires_grad = requires_grad
        self.ctx: Context | None = None
        self.gradient: Array | None = None  # the array behind `grad`
        self.gradient_buffer: Array | None = None  # where `gradient` shall lie, if anywhere
        self.grad_hooks: list[Callable[[Tensor], None]] = []

    @staticmethod
    def _wrap(data: Array) -> Tensor:
        return Tensor(data)

    # --- data -----------------------------------------------------------------------------------

    @property
    def data(self) -> Array:
        """The array, without the record."""
        return self._array

    @data.setter
    def data(self, array: Array) -> None:
        self._array = array

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.data.dtype  # type: ignore[no-any-return]

    def size(self, dim: int | None = None) -> Any:
        """Shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def item(self) -> Any:
        """The value of the only element."""
        return self.data.item()

    def numpy(self) -> np.ndarray[Any, Any]:
        """The data as a NumPy array; without a copy on the CPU."""
        data = self.data
        return data if isinstance(data, np.ndarray) else data.get()

    def tolist(self) -> Any:
        """The data as nested lists."""
        return self.numpy().tolist()

    def detach(self) -> Tensor:
        """The same data without the record; a copy only of values that are gathered for a time."""
        return Tensor(apart(self.data, self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor with no dimensions")
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.data)

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __repr__(self) -> str:
        values = widened(self.numpy())  # NumPy does not round what it does not know
        text = np.array2string(values, precision=4, separator=", ", prefix="tensor(")
        made = f", made by {self.ctx.primitive.name}" if self.ctx else ""
        leaf = ", requires_grad=True" if self.requires_grad and not self.ctx else ""
        return f"tensor({text}, dtype={self.dtype}{leaf}{made})"

    # --- gradients ------------------------------------------------------------------------------

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded primitive made this tensor."""
        return self.ctx is None

    @property
    def grad(self) -> Tensor | None:
        """The gradient accumulated so far; None before the first backward."""
        return None if self.gradient is None else Tensor(self.gradient)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self.gradient = None
        elif value.shape != self.shape:
            raise ValueError(f"grad: shape {value.shape} for a tensor of shape {self.shape}")
        else:
            self.gradient = None
            self.receive(value.data, fresh=False)

    def receive(self, gradient: Array, fresh: bool) -> None:
        """Take the first contribution to the gradient; `fresh`: nobody else holds the array."""
        buffer = self.gradient_buffer
        if buffer is not None:
            if gradient is not buffer:
                buffer[...] = gradient
            self.gradient = buffer
        else:
            if not fresh:
                own = empty(gradient.shape, gradient)
                own[...] = gradient
                gradient = own
            self.gradient = gradient

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Ask for a gradient (leaves only)."""
        if self.ctx is not None:
            raise RuntimeError("requires_grad_() on a result: only leaves can be told so")
        self.requires_grad = requires_grad
        return self

    def backward(self, gradient: Tensor | Array | None = None) -> None:
        """Add the gradient of this tensor with respect to every leaf to the leaf's `grad`.

        gradient: of the shape of this tensor; may be left out for one element (1 is taken).
        The record is freed as it is walked: a second backward needs a second forward.
        """
        from hpcml.autograd.backward import backward

        backward(self, gradient.data if isinstance(gradient, Tensor) else gradient)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Handle:
        """Call `hook(self)` in each backward as soon as all its contributions are in `grad`."""
        if self.ctx is not None:
            raise RuntimeError("register_post_accumulate_grad_hook() on a result: leaves only")
        self.grad_hooks.append(hook)
        return Handle(self.grad_hooks, hook)


class Handle:
    """What registering a hook returns: `remove()` takes the hook away."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self._hooks: list[Any] | None = hooks
        self._hook = hook

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        if self._hooks is not None:
            self._hooks.remove(self._hook)
            self._hooks = None


def while_alive(
    register: Callable[[Callable[..., Any]], Handle], method: Callable[..., Any]
) -> None:
    """Register a method as a hook that does not keep its object, and ends with it."""
    weak = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = weak()
        return handle.remove() if alive is None else alive(*args)

    handle = register(hook)


def _array(data: Any) -> Array:
    """The array of a tensor or of anything NumPy understands; Python's floats become float32."""
    if isinstance(data, Tensor):
        return data.data
    made = np.asarray(data)
    typed = hasattr(data, "dtype")  # NumPy's scalars and other libraries' arrays keep their type
    return made.astype(np.float32) if made.dtype == np.float64 and not typed else made


def from_dlpack(source: Any) -> Tensor:
    """A tensor in the memory of another library's array, on its device, without a copy."""
    on_cpu = source.__dlpack_device__()[0] == 1  # kDLCPU of dlpack.h
    return Tensor(backend.device_module("cpu" if on_cpu else "cuda").from_dlpack(source))


Primitive.tensor = Tensor
