"""Which array module, device and number type a computation uses, and how many threads it may take.

NumPy on the CPU, CuPy on a GPU, behind the same calls: code that holds an array asks `xp(array)`
for its module and never names one. CuPy is imported when the first GPU array is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from hpcml.errors import UserError

Array = Any  # numpy.ndarray or cupy.ndarray: CuPy is optional, so there is no common static type

at_import: list[Callable[[ModuleType], None]] = []
"""What is done to CuPy once it is imported."""

PRECISIONS = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def xp(array: Array) -> ModuleType:
    """Return the array module (numpy or cupy) that `array` belongs to."""
    return np if isinstance(array, np.ndarray | np.generic) else device_module("cuda")


@functools.cache
def device_module(kind: str) -> ModuleType:
    """Return numpy for "cpu" and cupy for "cuda"; a UserError says what is missing."""
    if kind == "cpu":
        return np
    if kind != "cuda":
        raise UserError(f'device.kind="{kind}" is unknown: set "cpu" or "cuda"')
    try:
        import cupy
    except ImportError as error:
        raise UserError(
            f'device.kind="cuda" needs CuPy ({error}): '
            'install hpcml[cuda13] or set device.kind="cpu"'
        ) from None
    for prepare in at_import:
        prepare(cupy)
    return cupy  # type: ignore[no-any-return]


def use_device(kind: str, local_rank: int) -> str:
    """Let this rank compute on its GPU, before it uses any; the name of what it computes on.

    Ranks of a node take its GPUs in turn. Raises UserError if there is none.
    """
    if kind == "cpu":
        return "cpu"
    cuda = device_module(kind).cuda
    remedy = 'see hpcml doctor, or set device.kind="cpu"'
    try:
        count = cuda.runtime.getDeviceCount()
    except Exception as error:  # noqa: BLE001 (CuPy without a driver raises its own kinds)
        raise UserError(f'device.kind="cuda" finds no GPU ({error}): {remedy}') from None
    if not count:
        raise UserError(f'device.kind="cuda" finds no GPU: {remedy}')
    number = local_rank % count
    cuda.Device(number).use()
    return f"cuda:{number}"


def is_array(value: object) -> bool:
    """Whether `value` is an array of NumPy or, if it has been imported, of CuPy."""
    if isinstance(value, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def kind(array: Array) -> str:
    """The device of an array: "cpu" or "cuda"."""
    return "cpu" if isinstance(array, np.ndarray | np.generic) else "cuda"


def to_kind(array: Array, kind: str) -> Array:
    """The array on another device; itself if it is there. A copy to the host waits for a GPU."""
    if kind == "cuda":
        return device_module(kind).asarray(array)
    return array if isinstance(array, np.ndarray) else array.get()


def numbers(arrays: Sequence[Array]) -> list[float]:
    """The values of arrays of one element; those of a GPU with one wait for it."""
    if not arrays or kind(arrays[0]) == "cpu":
        return [array.item() for array in arrays]
    return [float(value) for value in xp(arrays[0]).stack(arrays).get()]


def put(values: Array, out: Array) -> None:
    """out[...] = values, whatever devices they are on."""
    out[...] = to_kind(values, kind(out)) if kind(values) != kind(out) else values


def order(array: Array) -> tuple[int, ...]:
    """The dimensions of an array from the outermost in memory to the innermost."""
    if array.flags.c_contiguous:
        return tuple(range(array.ndim))
    return tuple(sorted(range(array.ndim), key=lambda i: -abs(array.strides[i])))


def in_order(array: Array) -> Array:
    """A view of an array with its dimensions as they lie in memory: C-contiguous if it is dense."""
    return array if array.flags.c_contiguous else array.transpose(order(array))


def dtype(name: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of "fp32", "float32", "bf16", ...; bfloat16 comes from ml_dtypes."""
    name = PRECISIONS.get(name, name) if isinstance(name, str) else name
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    try:
        found: np.dtype[Any] = np.dtype(name)
    except TypeError:
        raise UserError(f"dtype {name!r} is unknown: use one of {', '.join(PRECISIONS)}") from None
    return found


@functools.cache
def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether this is a 16-bit float: kept in 16 bits, computed with in float32."""
    return dtype.name in ("float16", "bfloat16")


def threads(default: bool = True) -> int:
    """Threads of this rank's kernels: as set, else OMP_NUM_THREADS, else all cores it may use.

    0 if there is no number set and `default` is False.
    """
    return _threads or (_default_threads() if default else 0)


@functools.cache
def _default_threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is by nesting level
    return int(asked) if asked.isdecimal() and int(asked) > 0 else len(cores())


def cores() -> list[int]:
    """Numbers of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def set_threads(count: int) -> None:
    """Let this rank use `count` threads: cores per rank, or ranks fight.

    They divide the work of a kernel among them, products of matrices too; the BLAS has one. Raises
    UserError for what is no number of threads.
    """
    global _threads
    if not 1 <= count <= MOST_THREADS:
        raise UserError(f"threads={count}: give a rank at least 1 and at most {MOST_THREADS}")
    import threadpoolctl

    _threads = count
    threadpoolctl.threadpool_limits(limits={"blas": 1, "openmp": count})
    os.environ["OMP_NUM_THREADS"] = str(count)  # for what is loaded later
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    else:  # once numba is loaded it refuses another value
        os.environ["NUMBA_NUM_THREADS"] = str(count)


_threads = 0  # of set_threads
MOST_THREADS = 256


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep large freed blocks instead of returning them to the system.

    A training step frees and asks for the same large buffers again and again; with glibc's default
    each one is a new mapping whose pages fault on first touch, five times slower than reuse.
    Elsewhere than glibc this does nothing.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # constants of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)
