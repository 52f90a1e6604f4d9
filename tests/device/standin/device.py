"""The stand-in's device: memory between guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tests.device.standin import order, streams

_GUARD = 64
_ALIGN = 256


class BaseMemory:
    """Bytes of the device, between guards."""

    def __init__(self, nbytes: int) -> None:
        self._all = np.full(nbytes + 2 * _GUARD + _ALIGN, 0xFF, np.uint8)
        start = -(self._all.ctypes.data + _GUARD) % _ALIGN
        self._low = self._all[start : start + _GUARD]
        self._high = self._all[start + _GUARD + nbytes :]
        self.bytes = self._all[start + _GUARD : start + _GUARD + nbytes]
        self.ptr, self.size, self.device_id = int(self.bytes.ctypes.data), nbytes, 0
        self._watched_by = order.active if nbytes else None
        if self._watched_by:
            self._watched_by.allocate(self.ptr, nbytes, streams.current().ptr)

    def __del__(self) -> None:
        if self._watched_by:
            self._watched_by.free(self.ptr)

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

    def copy_to_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        """Start to copy to pinned memory."""
        streams.copy("to host", mem.value, self.ptr, size)

    def copy_from_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        """Start to copy from pinned memory."""
        streams.copy("from host", self.ptr, mem.value, size)


class Device:
    """The only device."""

    attributes: ClassVar = {"MaxSharedMemoryPerBlockOptin": 232448}  # of an H200

    def __init__(self, number: int | None = None) -> None:
        self.id = number or 0

    def use(self) -> None:
        """Choose it."""
        used.append(self.id)

    def synchronize(self) -> None:
        """Wait; here no more is relied on than that the current stream is done."""
        streams.noted("syncs")
        streams.noted("whole device")
        streams.current().waited_for()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


used: list[int] = []


class OutOfMemoryError(MemoryError):
    """The device has no room."""


class Pool:
    """All memory of the device."""

    room = 1 << 40
    """Bytes of the largest block there can be."""

    def malloc(self, nbytes: int) -> MemoryPointer:
        """New memory."""
        if nbytes > self.room:
            raise OutOfMemoryError(nbytes)
        return MemoryPointer(BaseMemory(nbytes), 0)


class Allocator:
    """What gives memory to arrays: the pool, or what was set in its place."""

    pool = Pool()
    allocate: Callable[[int], MemoryPointer] = pool.malloc

    def set(self, allocate: Callable[[int], MemoryPointer]) -> None:
        """Let another one give it."""
        self.allocate = allocate


allocator = Allocator()
