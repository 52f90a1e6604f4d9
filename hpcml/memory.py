"""Memory by category: every array the package makes is counted, live and at its peak, in bytes.

`empty` is the one allocator. It hands out plain arrays; the bytes are counted down when the last
view of them is gone. The account belongs to the thread, since a rank may be a thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.backend import Array

CATEGORIES = ("params", "grads", "optim", "activations", "buffers")
ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register
_ALIGN_FROM = 1 << 16  # bytes: below this an unaligned start costs less than finding it out


class Account:
    """Bytes by category: `live[category]` now, `peak[category]` since `reset_peak`."""

    def __init__(self) -> None:
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.peak = dict.fromkeys(CATEGORIES, 0)

    def reset_peak(self) -> None:
        """Start a new measurement of the peaks."""
        self.peak = dict(self.live)

    def add(self, category: str, nbytes: int) -> None:
        """Count `nbytes` more (or, if negative, fewer) in `category`."""
        live = self.live[category] + nbytes
        self.live[category] = live
        if live > self.peak[category]:
            self.peak[category] = live


class _Block(np.ndarray[Any, Any]):
    """The bytes behind arrays; NumPy keeps it as their base, so it dies with the last view."""

    account: Account | None = None
    category: str
    counted: int
    owner: Any = None
    """Whose memory it is, where that matters; see `adopt`."""

    def __del__(self) -> None:
        if self.account is not None:
            self.account.live[self.category] -= self.counted


class _Local(threading.local):
    def __init__(self) -> None:
        self.account = Account()
        self.category = "activations"


_local = _Local()


def account() -> Account:
    """Return the account of this thread."""
    return _local.account


@contextmanager
def category(name: str) -> Iterator[None]:
    """Count what `empty` makes inside the block as `name` where the caller names no category."""
    assert name in CATEGORIES, name
    before, _local.category = _local.category, name
    try:
        yield
    finally:
        _local.category = before


def empty(
    shape: tuple[int, ...], dtype: Any, category: str | None = None, device: str = "cpu"
) -> Array:
    """Return an uninitialised C-contiguous array, counted in `category` until its last view dies.

    On "cuda" the array comes from CuPy's pool and is not counted here.
    """
    if device != "cpu":
        return backend.device_module(device).empty(shape, dtype)
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    offset = 0
    if nbytes >= _ALIGN_FROM:
        block = _Block(nbytes + ALIGNMENT, np.uint8)
        offset = -block.__array_interface__["data"][0] % ALIGNMENT
    else:
        block = _Block(nbytes, np.uint8)
    _count(block, category or _local.category, nbytes)
    return np.ndarray(shape, dtype, block, offset)


def adopt(
    region: Any, offset: int, shape: tuple[int, ...], dtype: Any, category: str, owner: Any
) -> Array:
    """Return an array in memory that somebody else has made, counted like one of `empty`.

    region: an object with the buffer interface, kept as long as a view of the array lives.
    owner: what `owner_of` gives for the array and its views.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    block = _Block(nbytes, np.uint8, region, offset)
    block.owner = owner
    _count(block, category, nbytes)
    return np.ndarray(shape, dtype, block)


def owner_of(array: Array) -> Any:
    """Return the owner of the memory of an array made by `adopt` or of a view of one, else None."""
    base = array.base
    while type(base) is np.ndarray:
        base = base.base
    return base.owner if type(base) is _Block else None


def _count(block: _Block, category: str, nbytes: int) -> None:
    block.category, block.counted = category, nbytes
    _local.account.add(category, nbytes)
    block.account = _local.account  # last: what was not added is not taken off either


def zeros(
    shape: tuple[int, ...], dtype: Any, category: str | None = None, device: str = "cpu"
) -> Array:
    """Return an array of zeros, counted like `empty`."""
    array = empty(shape, dtype, category, device)
    array.fill(0)
    return array
