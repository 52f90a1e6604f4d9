"""What is saved for backward, moved away until backward needs it.

vDNN (Rhu et al. 2016) and ZeRO-Offload and -Infinity (Rajbhandari et al. 2021) move what a GPU has
to the memory of the host, and what a host has to its disk. Here arrays of a GPU go to host memory,
those of the CPU to a file.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from hpcml import memory
from hpcml.backend import Array, xp
from hpcml.errors import UserError
from hpcml.parallel.packing import Packed, packed

SMALLEST = 1 << 10
"""Elements below which an array stays: it would cost more time than it gives memory."""


class Store:
    """A place for arrays: a file in a folder, of which space is used again.

    folder: on a disk, not in memory; by default that of temporary files. The file has no name, so
    nothing is left when the process ends. Raises UserError where it cannot be written.
    """

    def __init__(self, folder: str = "") -> None:
        self.folder = folder or None
        self._file: int | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}  # by size, where

    def offloaded(self) -> AbstractContextManager[None]:
        """Within, what is saved for backward is moved here."""
        return packed(self.put, SMALLEST)

    def put(self, array: Array) -> Packed:
        """Move an array here."""
        module = xp(array)
        if module is not np:
            return _OnHost(module, array.get())
        nbytes = array.nbytes
        spaces = self._free.get(nbytes)
        start = spaces.pop() if spaces else self._end
        self._end = max(self._end, start + nbytes)
        rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with self._told():
            while rest:
                done = os.pwrite(self._descriptor(), rest, start + nbytes - len(rest))
                rest = rest[done:]
        return _InFile(self, start, array.shape, array.dtype)

    def read(self, start: int, out: Array) -> None:
        """Read an array that was put at `start`."""
        rest = out.reshape(-1).view(np.uint8).data
        with self._told():
            while rest:
                done = os.preadv(self._descriptor(), [rest], start + out.nbytes - len(rest))
                if done == 0:
                    raise OSError("it has become shorter")
                rest = rest[done:]

    def free(self, start: int, nbytes: int) -> None:
        """Let space be used again."""
        self._free.setdefault(nbytes, []).append(start)

    def open(self) -> None:
        """See that the file can be made; raises UserError if not."""
        with self._told():
            self._descriptor()

    def _descriptor(self) -> int:
        if self._file is None:
            self._file, name = tempfile.mkstemp(dir=self.folder)
            weakref.finalize(self, os.close, self._file)
            os.unlink(name)
        return self._file

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"activations cannot be offloaded to {self.folder or 'the temporary folder'} "
                f"({error}): set pipeline.offload_dir to a folder with room"
            ) from None


@dataclass(frozen=True)
class _OnHost(Packed):
    module: ModuleType
    values: Array

    def get(self) -> Array:
        return self.module.asarray(self.values)


class _InFile(Packed):
    """In a file, until nobody refers to it any more."""

    def __init__(
        self, store: Store, start: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> None:
        self.store, self.start, self.shape, self.dtype = store, start, shape, dtype
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def get(self) -> Array:
        out = memory.empty(self.shape, self.dtype)
        self.store.read(self.start, out)
        return out

    def __del__(self) -> None:
        self.store.free(self.start, self.nbytes)
