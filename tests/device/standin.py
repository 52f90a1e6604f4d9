"""A module that stands for CuPy where there is no GPU: arrays on host memory that NumPy cannot use.

`ndarray` wraps an array of NumPy's and refuses what CuPy's refuses: to become NumPy's unasked, to
be mixed with NumPy's arrays, to be given to NumPy's functions. What waits for the device is
counted (`syncs`). New memory is full of NaN, and bytes around each array show who writes beyond it.
Kernels run by `emulator`, cuBLAS by NumPy on the pointers and strides that it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.device import emulator

_GUARD = 64
_ALIGN = 256


class _Counter:
    def __init__(self) -> None:
        self.syncs = 0
        self.lock = threading.Lock()

    def wait(self) -> None:
        with self.lock:
            self.syncs += 1


counter = _Counter()


def syncs() -> int:
    """How often the host has waited for the device."""
    return counter.syncs


class BaseMemory:
    """Bytes of the device, between guards."""

    def __init__(self, nbytes: int) -> None:
        self._all = np.full(nbytes + 2 * _GUARD + _ALIGN, 0xFF, np.uint8)
        start = -(self._all.ctypes.data + _GUARD) % _ALIGN
        self._low = self._all[start : start + _GUARD]
        self._high = self._all[start + _GUARD + nbytes :]
        self.bytes = self._all[start + _GUARD : start + _GUARD + nbytes]
        self.ptr, self.size, self.device_id = int(self.bytes.ctypes.data), nbytes, 0

    def check(self) -> None:
        """Fail if somebody wrote beyond."""
        assert (self._low == 0xFF).all() and (self._high == 0xFF).all(), "wrote beyond an array"


class UnownedMemory:
    """Memory of somebody else, here always that of a `BaseMemory`."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id

    def check(self) -> None:
        """Its owner looks after it."""


class MemoryPointer:
    """A place in memory."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class Flags:
    """What CuPy tells of an array's order."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous


class Device:
    """The only device."""

    def __init__(self, number: int | None = None) -> None:
        self.id = number or 0

    def use(self) -> None:
        """Choose it."""
        used.append(self.id)

    def synchronize(self) -> None:
        """Wait."""
        counter.wait()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


used: list[int] = []


def _plain(value: Any, name: str = "an operation") -> Any:
    """The host's view of an argument, for NumPy; a TypeError for what CuPy does not take."""
    if isinstance(value, ndarray):
        return value.memory
    if isinstance(value, np.ndarray):
        raise TypeError(f"{name}: Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple | list):
        return type(value)(_plain(v, name) for v in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray.around(np.asarray(value))
    if isinstance(value, tuple | list):
        return type(value)(_wrap(v) for v in value)
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
            memptr = MemoryPointer(BaseMemory(count), 0)
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

    def __len__(self) -> int:
        return len(self.memory)

    def __repr__(self) -> str:
        return f"device array {self.shape} {self.dtype}"

    def _view(self, values: Any) -> ndarray:
        return ndarray.around(values, self.root)

    # --- to the host, which waits ----------------------------------------------------------------

    def get(self, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        counter.wait()
        return self.memory.copy()

    def set(self, values: np.ndarray[Any, Any]) -> None:
        """Copy from the host."""
        assert type(values) is np.ndarray and values.shape == self.shape
        assert values.dtype == self.dtype and self.memory.flags.c_contiguous
        self.memory[...] = values

    def item(self, *args: Any) -> Any:
        """An element."""
        counter.wait()
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
        counter.wait()
        return self.memory.__index__()

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # NumPy's scalars on the left come here, as with CuPy; a call of NumPy's function does not.
        if method != "__call__" or kwargs or not any(isinstance(x, np.generic) for x in inputs):
            raise TypeError(f"numpy.{ufunc.__name__} was called with an array of the device")
        return _wrap(ufunc(*map(_plain, inputs)))

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called with an array of the device")

    # --- elements and order ----------------------------------------------------------------------

    def __getitem__(self, index: Any) -> ndarray:
        found = self.memory[_plain(index, "index")]
        if not _basic(index):
            return ndarray.around(np.asarray(found))
        if isinstance(found, np.ndarray):
            return self._view(found)
        return self._view(self.memory[(*index, ...) if isinstance(index, tuple) else (index, ...)])

    def __setitem__(self, index: Any, value: Any) -> None:
        with np.errstate(all="ignore"):
            self.memory[_plain(index, "index")] = _plain(value, "setitem")

    def reshape(self, *shape: Any) -> ndarray:
        """A view if that can be."""
        found = self.memory.reshape(*shape)
        if np.shares_memory(found, self.memory) or not found.size:
            return self._view(found)
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
            return ndarray.around(self.memory.astype(dtype))

    def copy(self, order: str = "C") -> ndarray:
        """A copy."""
        return ndarray.around(self.memory.copy(order))

    def fill(self, value: Any) -> None:
        """All elements become one value."""
        self.memory.fill(_plain(value, "fill"))


ndarray.__module__ = "cupy"


def _basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, ndarray | list) for part in parts)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: ndarray, *others: Any) -> Any:
        if any(isinstance(other, np.ndarray) or not _known(other) for other in others):
            return NotImplemented
        with np.errstate(all="ignore"):
            result = getattr(self.memory, name)(*map(_plain, others))
        if result is NotImplemented:
            return result
        return self if name.startswith("__i") and name != "__invert__" else _wrap(result)

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
            result = getattr(self.memory, name)(*map(_plain, args), **kwargs)
        if out is None:
            return _wrap(result)
        out.memory[...] = result
        return out

    return call


for _name in ("sum", "mean", "var", "max", "min", "argmax", "argmin", "prod", "any", "all",
              "cumsum", "clip", "argsort", "take"):  # fmt: skip
    setattr(ndarray, _name, _method(_name))


def _function(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", None)
        args = tuple([_plain(arg, name) for arg in args])
        kwargs = {key: _plain(value, name) for key, value in kwargs.items()}
        with np.errstate(all="ignore"):
            result = function(*args, **kwargs)
        if out is None:
            return _wrap(result)
        out.memory[...] = result
        return out

    return call


SAME = (
    "add", "subtract", "multiply", "true_divide", "divide", "power", "negative", "exp", "log",
    "sqrt", "absolute", "abs", "sign", "tanh", "maximum", "minimum", "logaddexp", "matmul",
    "isnan", "isfinite", "isinf", "where", "concatenate", "stack", "unique", "argsort", "tril",
    "triu", "take_along_axis", "flatnonzero", "nonzero", "tensordot", "arange", "zeros", "ones",
    "full", "zeros_like", "ones_like", "full_like", "sum", "mean", "any", "all", "argmax", "take",
    "cumsum", "floor_divide", "remainder", "sin", "cos", "floor", "clip", "sort", "searchsorted",
    "rint", "square", "float_power", "array_equal", "split", "linspace", "eye", "repeat", "max",
    "min", "logical_and", "logical_or", "logical_not", "invert", "greater", "less", "equal",
    "not_equal", "pad", "array_split", "outer", "dot",
)  # fmt: skip
"""Functions of NumPy that CuPy has too, and that give new arrays."""
VIEWS = ("broadcast_to", "expand_dims", "moveaxis", "swapaxes", "transpose", "squeeze", "ravel",
         "broadcast_arrays", "flip", "atleast_1d")  # fmt: skip
"""Those that give views."""


def _viewing(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def call(x: ndarray, *args: Any, **kwargs: Any) -> Any:
        result = function(_plain(x, name), *map(_plain, args), **kwargs)
        return x._view(result) if isinstance(result, np.ndarray) else _wrap(result)

    return call


def _empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype)


def _empty_like(x: ndarray, dtype: Any = None) -> ndarray:
    made = np.empty_like(_plain(x, "empty_like"), dtype)
    return ndarray.around(np.full_like(made, np.nan if made.dtype.kind not in "biu" else 77))


def _asarray(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    return ndarray.around(np.asarray(x, dtype))


def _array(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    return ndarray.around(np.array(_plain(x) if isinstance(x, ndarray) else x, dtype))


def _ascontiguousarray(x: ndarray) -> ndarray:
    return x if x.flags.c_contiguous else x.copy()


def _asnumpy(x: ndarray, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def _shares(a: ndarray, b: ndarray, *_: Any) -> bool:
    return bool(np.may_share_memory(_plain(a), _plain(b)))


class Stream:
    """A stream; everything has happened already."""

    null: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ptr = 0

    def synchronize(self) -> None:
        """Wait."""
        counter.wait()

    def wait_event(self, event: Any) -> None:
        """Let what follows wait, not the host."""

    def record(self, event: Any = None) -> Any:
        """An event after what was started."""
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Put it there."""

    def synchronize(self) -> None:
        """Wait."""
        counter.wait()


class _Pool:
    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return 0

    def set_limit(self, **_: Any) -> None:
        pass

    def free_all_blocks(self) -> None:
        pass


# --- cuBLAS ---------------------------------------------------------------------------------------

_TYPES: dict[int, Any] = {0: np.float32, 1: np.float64, 2: np.float16, 14: "bfloat16"}
_SUMS = {68: np.float32, 70: np.float64}


def _matrix(pointer: int, kind: int, rows: int, columns: int, leading: int) -> np.ndarray[Any, Any]:
    """A matrix that lies column after column, as cuBLAS has them."""
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if kind == 14 else _TYPES[kind])
    assert leading >= max(rows, 1), f"leading dimension {leading} of {rows} rows"
    count = leading * (columns - 1) + rows
    raw = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(pointer)
    size = dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        np.frombuffer(raw, dtype), (rows, columns), (size, leading * size)
    )


def _scalar(address: int, kind: int) -> float:
    dtype = np.dtype(_SUMS[kind])
    raw = (ctypes.c_ubyte * dtype.itemsize).from_address(address)
    return float(np.frombuffer(raw, dtype)[0])


def _gemm(
    ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, at: int, lda: int,
    b: int, bt: int, ldb: int, beta: int, c: int, ct: int, ldc: int, compute: int,
) -> None:  # fmt: skip
    x = _matrix(a, at, *((k, m) if ta else (m, k)), lda)
    y = _matrix(b, bt, *((n, k) if tb else (k, n)), ldb)
    z = _matrix(c, ct, m, n, ldc)
    assert at == bt and (ct == at or (ct == 0 and at in (2, 14))), (at, bt, ct)
    sums = np.float64 if compute == 70 else np.float32
    assert (sums == np.float64) == (at == 1)
    wide = (x.T if ta else x).astype(sums) @ (y.T if tb else y).astype(sums)
    wide *= _scalar(alpha, compute)
    old = _scalar(beta, compute)
    if old:
        wide += old * z.astype(sums)
    z[...] = wide


class _Cublas(types.ModuleType):
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT = 68, 70, -1

    @staticmethod
    def gemmEx(
        handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
        a: int, at: int, lda: int, b: int, bt: int, ldb: int, beta: int,
        c: int, ct: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        """C = alpha op(A) op(B) + beta C."""
        _gemm(ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute)

    @staticmethod
    def gemmStridedBatchedEx(
        handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
        a: int, at: int, lda: int, sa: int, b: int, bt: int, ldb: int, sb: int, beta: int,
        c: int, ct: int, ldc: int, sc: int, count: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        """The same for matrices at constant distances, in elements."""
        sizes = [2 if kind in (2, 14) else 4 if kind == 0 else 8 for kind in (at, bt, ct)]
        for i in range(count):
            ai, bi, ci = (
                p + i * s * size for p, s, size in zip((a, b, c), (sa, sb, sc), sizes, strict=True)
            )
            _gemm(ta, tb, m, n, k, alpha, ai, at, lda, bi, bt, ldb, beta, ci, ct, ldc, compute)


def module() -> types.ModuleType:
    """The stand-in for the module `cupy`."""
    made: Any = types.ModuleType("cupy")
    made.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    made.__version__ = "0 (a stand-in of the tests)"
    for name in SAME:
        setattr(made, name, _function(name))
    for name in VIEWS:
        setattr(made, name, _viewing(name))
    for name in ("float16", "float32", "float64", "int32", "int64", "uint16", "uint32", "uint64",
                 "bool_", "inf", "nan", "pi", "newaxis", "dtype", "result_type",
                 "broadcast_shapes"):  # fmt: skip
        setattr(made, name, getattr(np, name))
    made.ndarray, made.empty, made.empty_like = ndarray, _empty, _empty_like
    made.asarray, made.array, made.ascontiguousarray = _asarray, _array, _ascontiguousarray
    made.asnumpy, made.may_share_memory, made.shares_memory = _asnumpy, _shares, _shares
    made.broadcast = lambda *a: np.broadcast(*[_plain(x) for x in a])
    made.RawModule = emulator.RawModule
    runtime = types.SimpleNamespace(
        CUDA_R_32F=0, CUDA_R_64F=1, CUDA_R_16F=2, CUDA_R_16BF=14,
        getDeviceCount=lambda: 1, getDevice=lambda: 0, memGetInfo=lambda: (1 << 34, 1 << 34),
    )  # fmt: skip
    stream = Stream()
    made.cuda = types.SimpleNamespace(
        runtime=runtime, Device=Device, Stream=Stream, Event=Event, MemoryPointer=MemoryPointer,
        UnownedMemory=UnownedMemory, alloc=lambda n: MemoryPointer(BaseMemory(n), 0),
        get_current_stream=lambda: stream,
        device=types.SimpleNamespace(get_cublas_handle=lambda: 1),
    )  # fmt: skip
    pool = _Pool()
    made.get_default_memory_pool = lambda: pool
    return made  # type: ignore[no-any-return]


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """Within, `import cupy` gives the stand-in."""
    from hpcml import backend

    made = module()
    libs = types.ModuleType("cupy_backends.cuda.libs")
    libs.cublas = _Cublas("cublas")  # type: ignore[attr-defined]
    modules = {
        "cupy": made,
        "cupy_backends": types.ModuleType("cupy_backends"),
        "cupy_backends.cuda": types.ModuleType("cupy_backends.cuda"),
        "cupy_backends.cuda.libs": libs,
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    backend.device_module.cache_clear()
    try:
        yield made
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
        backend.device_module.cache_clear()
