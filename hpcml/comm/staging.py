"""Arrays of a GPU and their messages: the one file of communication that knows devices.

Arrays are NumPy's or CuPy's, or of anybody who has DLPack, whose memory is then used as one of the
two. Our algorithms work on them where they lie; what goes between ranks are messages, which take
one of two ways:

- direct: MPI is given memory of the device, after the host has waited for it;
- staged: by way of pinned memory of the host, a chunk at a time. All copies to the host are started
  at once, so that the next chunk is copied while the one before is on its way; a chunk that has
  come is copied to the device while the next is awaited.

On the wire both are the same messages, so that the ends need not take the same way. CuPy is
imported when the first array is one of its own.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from hpcml import backend, memory
from hpcml.comm.pieces import Several, pieces
from hpcml.comm.transport import Array, Pending, Transport

T = TypeVar("T")

CHUNK = 4 << 20
"""Bytes of the longest message of device memory: what is copied while another is on its way. Not
measured yet. Tests lower it."""

_HOST = 1  # kDLCPU of the DLPack standard


def on_device(x: object) -> bool:
    """Whether x is an array of CuPy."""
    kind = type(x)
    return kind is not np.ndarray and kind.__module__.partition(".")[0] == "cupy"


def as_array(x: Any, read: bool = True) -> Array:
    """The object as an array of NumPy or CuPy in the same memory.

    Takes arrays of both, objects with `__dlpack__` and, to `read`, NumPy scalars. Raises
    `TypeError` for anything else and `ValueError` if DLPack cannot carry the type.
    """
    if isinstance(x, np.ndarray):
        # A subclass may have rules of its own: a matrix is never flat.
        return x if type(x) is np.ndarray else x.view(np.ndarray)
    if on_device(x):
        found: Array = x
        return found
    if isinstance(x, np.generic) and read:  # what NumPy makes of a sum; nothing to write to
        return np.asarray(x)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"expected a NumPy or CuPy array or one with __dlpack__, not {x!r:.60}")
    if x.__dlpack_device__()[0] != _HOST:
        of_gpu: Array = _cupy().from_dlpack(x)
        return of_gpu
    try:
        return np.from_dlpack(x)
    except (RuntimeError, BufferError) as error:
        raise ValueError(
            f"DLPack cannot hand this {type(x).__name__} to NumPy ({error}): "
            "pass a NumPy array, for bfloat16 one of ml_dtypes.bfloat16"
        ) from error


def room(like: Array, count: int, dtype: Any = None) -> Array:
    """A flat array of `count` elements for an algorithm's own use, on the device of `like`.

    Counted among "buffers". Raises MemoryLimitError.
    """
    dtype = like.dtype if dtype is None else dtype
    device = "cuda" if on_device(like) else "cpu"
    made: Array = memory.empty((count,), dtype, "buffers", device)
    return made


def wait_for_device() -> None:
    """Return when the device has done what was started on the current stream.

    MPI knows nothing of streams: it may read or write memory of the device only after this.
    """
    _cupy().cuda.get_current_stream().synchronize()


def isend(transport: Transport, buffer: Array, dest: int, tag: int, direct: bool) -> Pending:
    """Start to send an array of the device, which stays unchanged until `wait`."""
    if direct:
        wait_for_device()
        return Several([transport.isend(piece, dest, tag) for piece in pieces(buffer, CHUNK)])
    copies = []
    for piece, place in _paired(buffer):
        piece.data.copy_to_host_async(_address(place), place.nbytes)
        copied = _cupy().cuda.Event(disable_timing=True)
        copied.record()
        copies.append((copied, place))
    messages = []
    for copied, place in copies:
        copied.synchronize()
        messages.append(transport.isend(place, dest, tag))
    return Several(messages)


def irecv(transport: Transport, buffer: Array, source: int, tag: int, direct: bool) -> Pending:
    """Start to receive into an array of the device, which is not touched until `wait`."""
    if direct:
        wait_for_device()
        return Several([transport.irecv(piece, source, tag) for piece in pieces(buffer, CHUNK)])
    return _Landing(
        [
            (transport.irecv(place, source, tag), piece, place)
            for piece, place in _paired(buffer)
        ]
    )  # fmt: skip


class _Landing:
    """Messages that come to the host, and are copied on to the device."""

    def __init__(self, coming: Sequence[tuple[Pending, Any, Array]]) -> None:
        self._coming = deque(coming)
        self._landing: list[Array] = []

    def wait(self) -> None:
        """Return when all are on the device."""
        while self._coming:
            self._coming[0][0].wait()
            self._land()
        self._finish()

    def test(self) -> bool:
        """Whether all have come; those that have are copied on."""
        while self._coming and self._coming[0][0].test():
            self._land()
        if self._coming:
            return False
        self._finish()
        return True

    def _land(self) -> None:
        _, piece, place = self._coming.popleft()
        piece.data.copy_from_host_async(_address(place), place.nbytes)
        self._landing.append(place)

    def _finish(self) -> None:
        """The host's memory goes to others once nothing is copied from there any more."""
        if self._landing:
            wait_for_device()
            self._landing.clear()


def beside(x: Any, call: Callable[[], T]) -> Callable[[], T]:
    """A call with the array x for another thread to make, on x's device and a stream of its own.

    There it comes after all that the caller has started by now; when it returns, the device has
    done what it started. For an array of NumPy the call itself.
    """
    if not on_device(x):
        return call
    device, started = x.device, _cupy().cuda.Event(disable_timing=True)
    started.record()

    def made() -> T:
        with device, _own_stream(device.id) as stream:
            stream.wait_event(started)
            result = call()
            wait_for_device()
            return result

    return made


class _Streams(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[int, Any] = {}


_streams = _Streams()


def _own_stream(device: int) -> Any:
    """The stream of this thread on the device, which is the current one."""
    if device not in _streams.by_device:
        _streams.by_device[device] = _cupy().cuda.Stream(non_blocking=True)
    return _streams.by_device[device]


def _paired(buffer: Array) -> list[tuple[Any, Array]]:
    """The buffer's pieces, each with as many bytes of pinned memory of the host."""
    if not buffer.size:
        return []
    memory.account().require("buffers", buffer.nbytes)
    pinned = _cupy().cuda.alloc_pinned_memory(buffer.nbytes)
    host: Array = memory.adopt(pinned, 0, (buffer.nbytes,), np.uint8, "buffers", None)
    parts: list[Any] = pieces(buffer, CHUNK)
    return list(zip(parts, pieces(host, CHUNK), strict=True))


def _address(host: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(host.ctypes.data)


def _cupy() -> Any:
    return backend.device_module("cuda")
