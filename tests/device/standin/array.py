"""The stand-in's array: what CuPy's does, and refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.device.standin import order, streams
from tests.device.standin.device import Device, MemoryPointer, allocator


class Flags:
    """What CuPy tells of an array's order."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous


def plain(value: Any, name: str = "an operation", read: bool = True) -> Any:
    """The host's view of an argument, for NumPy; a TypeError for what CuPy does not take.

    read: its elements, not its shape alone.
    """
    if isinstance(value, ndarray):
        if read:
            streams.touch(value.memory)
        return value.memory
    if isinstance(value, np.ndarray):
        raise TypeError(f"{name}: Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple | list):
        return type(value)(plain(v, name) for v in value)
    return value


def wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray.around(np.asarray(value))
    if isinstance(value, tuple | list):
        return type(value)(wrap(v) for v in value)
    return value


class ndarray:
    """An array of the device."""

    __array_priority__ = 100
    memory: np.ndarray[Any, Any]
    root: Any

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None
    ) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if memptr is None:
            memptr = allocator.allocate(count)
        self.root = memptr.mem
        raw = (ctypes.c_ubyte * count).from_address(memptr.ptr) if count else bytearray(0)
        self.memory = np.frombuffer(raw, dtype).reshape(shape)

    @classmethod
    def around(cls, values: np.ndarray[Any, Any], root: Any = None) -> ndarray:
        """An array like `values`: of that memory if its `root` is given, else in new memory."""
        if root is None:
            order = tuple(sorted(range(values.ndim), key=lambda i: -abs(values.strides[i])))
            lying = values.transpose(order)
            made = cls(lying.shape, values.dtype)
            made.memory[...] = lying
            streams.touch(made.memory, write=True)
            return made.transpose(np.argsort(order).tolist()) if values.ndim else made
        made = cls.__new__(cls)
        made.memory, made.root = values, root
        return made

    # --- what it is -----------------------------------------------------------------------------

    @property
    def data(self) -> Any:
        """The place of the first element."""
        return MemoryPointer(self.root, int(self.memory.ctypes.data) - self.root.ptr)

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    ndim = property(lambda self: self.memory.ndim)
    size = property(lambda self: self.memory.size)
    itemsize = property(lambda self: self.memory.itemsize)
    nbytes = property(lambda self: self.memory.nbytes)
    strides = property(lambda self: self.memory.strides)
    flags = property(lambda self: Flags(self.memory.flags))
    device = property(lambda self: Device(0))
    T = property(lambda self: self._view(self.memory.T))

    @property
    def __cuda_array_interface__(self) -> Any:
        """For MPI, which takes it: the memory is the host's."""
        if order.active:
            order.active.touch_by_host(self.memory)
        return self.memory.__array_interface__ | {"version": 3}

    def __len__(self) -> int:
        return len(self.memory)

    def __repr__(self) -> str:
        return f"device array {self.shape} {self.dtype}"

    def _view(self, values: Any) -> ndarray:
        return ndarray.around(values, self.root)

    # --- to the host, which waits ----------------------------------------------------------------

    def get(self, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        streams.read(self.memory)
        return self.memory.copy()

    def set(self, values: np.ndarray[Any, Any]) -> None:
        """Copy from the host."""
        assert type(values) is np.ndarray and values.shape == self.shape
        assert values.dtype == self.dtype and self.memory.flags.c_contiguous
        streams.touch(self.memory, write=True)
        self.memory[...] = values

    def item(self, *args: Any) -> Any:
        """An element."""
        streams.read(self.memory)
        return self.memory.item(*args)

    def tolist(self) -> Any:
        """Nested lists."""
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        streams.read(self.memory)
        return self.memory.__index__()

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # NumPy's scalars on the left come here, as with CuPy; a call of NumPy's function does not.
        if method != "__call__" or kwargs or not any(isinstance(x, np.generic) for x in inputs):
            raise TypeError(f"numpy.{ufunc.__name__} was called with an array of the device")
        return wrap(ufunc(*map(plain, inputs)))

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called with an array of the device")

    # --- elements and order ----------------------------------------------------------------------

    def __getitem__(self, index: Any) -> ndarray:
        found = self.memory[plain(index, "index")]
        if not _basic(index):
            streams.touch(self.memory)
            return ndarray.around(np.asarray(found))
        if isinstance(found, np.ndarray):
            return self._view(found)
        return self._view(self.memory[(*index, ...) if isinstance(index, tuple) else (index, ...)])

    def __setitem__(self, index: Any, value: Any) -> None:
        place, values = plain(index, "index"), plain(value, "setitem")
        streams.touch(np.asarray(self.memory[place]) if _basic(index) else self.memory, write=True)
        with np.errstate(all="ignore"):
            self.memory[place] = values

    def reshape(self, *shape: Any) -> ndarray:
        """A view if that can be."""
        found = self.memory.reshape(*shape)
        if np.shares_memory(found, self.memory) or not found.size:
            return self._view(found)
        streams.touch(self.memory)
        return ndarray.around(found)

    def transpose(self, *axes: Any) -> ndarray:
        """A view."""
        return self._view(self.memory.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> ndarray:
        """A view."""
        return self._view(self.memory.swapaxes(a, b))

    def squeeze(self, axis: Any = None) -> ndarray:
        """A view."""
        return self._view(self.memory.squeeze(axis))

    def ravel(self) -> ndarray:
        """In one dimension."""
        return self.reshape(-1)

    def view(self, dtype: Any) -> ndarray:
        """The same bytes as of another type."""
        return self._view(self.memory.view(dtype))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        """Of another type."""
        if not copy and self.dtype == np.dtype(dtype):
            return self
        with np.errstate(all="ignore"):
            return ndarray.around(plain(self).astype(dtype))

    def copy(self, order: str = "C") -> ndarray:
        """A copy."""
        return ndarray.around(plain(self).copy(order))

    def fill(self, value: Any) -> None:
        """All elements become one value."""
        streams.touch(self.memory, write=True)
        self.memory.fill(plain(value, "fill"))


ndarray.__module__ = "cupy"


def _basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, ndarray | list) for part in parts)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: ndarray, *others: Any) -> Any:
        if any(isinstance(other, np.ndarray) or not _known(other) for other in others):
            return NotImplemented
        in_place = name.startswith("__i") and name != "__invert__"
        streams.touch(self.memory, in_place)
        with np.errstate(all="ignore"):
            result = getattr(self.memory, name)(*map(plain, others))
        if result is NotImplemented:
            return result
        return self if in_place else wrap(result)

    return apply


def _known(value: Any) -> bool:
    return isinstance(value, ndarray | np.generic | int | float | bool)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
              "and", "or", "xor", "lshift", "rshift"):  # fmt: skip
    for _form in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(ndarray, _form, _operator(_form))
for _name in ("neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "pos"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _method(name: str) -> Callable[..., Any]:
    def call(self: ndarray, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = getattr(plain(self), name)(*map(plain, args), **kwargs)
        if out is None:
            return wrap(result)
        streams.touch(out.memory, write=True)
        out.memory[...] = result
        return out

    return call


for _name in ("sum", "mean", "var", "max", "min", "argmax", "argmin", "prod", "any", "all",
              "cumsum", "clip", "argsort", "take"):  # fmt: skip
    setattr(ndarray, _name, _method(_name))
