"""From the caller's array to host memory and back: the one file that knows devices here.

CuPy arrays are copied to the host on their current stream, which the copy waits for, and the result
is copied back; CuPy is imported only when an array is one of its own. Any other object is taken
through DLPack: host memory is used where it lies, device memory goes by way of CuPy.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml.comm.transport import Array

_HOST = 1  # kDLCPU of the DLPack standard


@dataclass(frozen=True)
class Staged:
    """An array of the caller's as host memory."""

    host: Array
    """The array itself, a view of its memory, or a copy of device memory."""
    device: Any = None
    """The CuPy array that `host` is a copy of, or None."""

    def commit(self) -> None:
        """Carry what was written to `host` over to the caller's array."""
        if self.device is not None:
            with self.device.device:
                self.device.set(self.host)
                # The host copy may be freed right after: wait until the device has read it.
                _cupy().cuda.get_current_stream().synchronize()

    def like(self, result: Array) -> Any:
        """A result as the kind of array that the caller works with: CuPy or NumPy."""
        if self.device is None:
            return result
        with self.device.device:
            return _cupy().asarray(result)


def stage(x: Any, read: bool = True) -> Staged:
    """Make the array available as host memory; `read=False` if its content does not matter.

    Takes NumPy and CuPy arrays, objects with `__dlpack__` and, to read, NumPy scalars. Raises
    `TypeError` for anything else and `ValueError` if DLPack cannot carry the type.
    """
    if isinstance(x, np.ndarray):
        return Staged(x)
    if isinstance(x, np.generic) and read:  # what NumPy makes of a sum; nothing to write to
        return Staged(np.asarray(x))
    if on_device(x):
        return _from_device(x, read)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"expected a NumPy or CuPy array or one with __dlpack__, not {x!r:.60}")
    if x.__dlpack_device__()[0] != _HOST:
        return _from_device(_cupy().from_dlpack(x), read)
    try:
        return Staged(np.from_dlpack(x))
    except (RuntimeError, BufferError) as error:
        raise ValueError(
            f"DLPack cannot hand this {type(x).__name__} to NumPy ({error}): "
            "pass a NumPy array, for bfloat16 one of ml_dtypes.bfloat16"
        ) from error


def _from_device(x: Any, read: bool) -> Staged:
    host = _cupy().asnumpy(x) if read else np.empty(x.shape, x.dtype)
    return Staged(host, device=x)


def on_device(x: object) -> bool:
    """Whether x is an array of CuPy."""
    return type(x).__module__.partition(".")[0] == "cupy"


def _cupy() -> Any:
    return importlib.import_module("cupy")
