"""A module that stands for CuPy where there is no GPU: arrays on the host that NumPy cannot use.

`array.ndarray` wraps an array of NumPy's and refuses what CuPy's refuses: to become NumPy's
unasked, to be mixed with NumPy's arrays, to be given to NumPy's functions. What waits for the
device is counted (`syncs`). New memory is full of NaN, and bytes around each array show who writes
beyond it. Kernels run by `emulator`, cuBLAS and cuDNN by NumPy.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.device import emulator
from tests.device.standin import cudnn
from tests.device.standin.array import ndarray
from tests.device.standin.cublas import Cublas
from tests.device.standin.device import (
    Device,
    MemoryPointer,
    OutOfMemoryError,
    UnownedMemory,
    allocator,
    used,
)
from tests.device.standin.functions import FUNCTIONS
from tests.device.standin.streams import (
    Event,
    Stream,
    alloc_pinned_memory,
    current,
    get_elapsed_time,
    syncs,
)

__all__ = ["cudnn", "installed", "module", "syncs", "used", "with_cudnn"]


def module() -> types.ModuleType:
    """The stand-in for the module `cupy`."""
    made: Any = types.ModuleType("cupy")
    made.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    made.__version__ = "0 (a stand-in of the tests)"
    for name, function in FUNCTIONS.items():
        setattr(made, name, function)
    for name in ("float16", "float32", "float64", "int32", "int64", "uint16", "uint32", "uint64",
                 "bool_", "inf", "nan", "pi", "newaxis", "dtype", "result_type",
                 "broadcast_shapes"):  # fmt: skip
        setattr(made, name, getattr(np, name))
    made.ndarray = ndarray
    made.RawModule = emulator.RawModule
    runtime = types.SimpleNamespace(
        CUDA_R_32F=0, CUDA_R_64F=1, CUDA_R_16F=2, CUDA_R_16BF=14,
        getDeviceCount=lambda: 1, getDevice=lambda: 0, memGetInfo=lambda: (1 << 34, 1 << 34),
    )  # fmt: skip
    made.cuda = types.SimpleNamespace(
        runtime=runtime, Device=Device, Stream=Stream, Event=Event, MemoryPointer=MemoryPointer,
        UnownedMemory=UnownedMemory, set_allocator=allocator.set,
        get_current_stream=current, get_elapsed_time=get_elapsed_time,
        alloc_pinned_memory=alloc_pinned_memory,
        device=types.SimpleNamespace(get_cublas_handle=lambda: 1),
    )  # fmt: skip
    made.cuda.memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    made.get_default_memory_pool = lambda: allocator.pool
    return made  # type: ignore[no-any-return]


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """Within, `import cupy` gives the stand-in, and there is no cuDNN (see `with_cudnn`)."""
    from hpcml import backend
    from hpcml.kernels.cuda.cudnn import library

    made = module()
    libs = types.ModuleType("cupy_backends.cuda.libs")
    libs.cublas = Cublas("cublas")  # type: ignore[attr-defined]
    modules = {
        "cupy": made,
        "cupy_backends": types.ModuleType("cupy_backends"),
        "cupy_backends.cuda": types.ModuleType("cupy_backends.cuda"),
        "cupy_backends.cuda.libs": libs,
        "cudnn": None,
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    backend.device_module.cache_clear()
    library.forget()
    try:
        yield made
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
        backend.device_module.cache_clear()
        library.forget()


@contextlib.contextmanager
def with_cudnn() -> Iterator[Any]:
    """Within, `import cudnn` gives the stand-in."""
    from hpcml.kernels.cuda.cudnn import library

    before = sys.modules.get("cudnn")
    made = sys.modules["cudnn"] = cudnn.module()
    library.forget()
    try:
        yield made
    finally:
        sys.modules["cudnn"] = before  # type: ignore[assignment]
        library.forget()
