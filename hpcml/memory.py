"""Memory by category: every array the package makes is counted, live and at its peak, in bytes.

`empty` is the one allocator. It hands out plain arrays; the bytes are counted down when the last
view of them is gone. The account belongs to the thread, since a rank may be a thread; so does its
limit, beyond which nothing is handed out. A thread that works for another counts in the account of
that one (`standing`, `stand_in`).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.account import CATEGORIES, Account
from hpcml.backend import Array
from hpcml.errors import UserError

ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register
_ALIGN_FROM = 1 << 16  # bytes: below this an unaligned start costs less than finding it out


_byte: Any = ctypes.c_char  # it gives an array's address faster than the array does


class _Block(np.ndarray[Any, Any]):
    """The bytes behind arrays; NumPy keeps it as their base, so it dies with the last view.

    owner: whose memory it is, where that matters; see `adopt`.
    """

    __slots__ = ("log", "owner", "returned")
    log: deque[tuple[str, int]] | None
    owner: Any
    returned: tuple[str, int]

    def __init__(self, *_: Any) -> None:
        self.log = self.owner = None

    def __del__(self) -> None:
        log = getattr(self, "log", None)  # a copy of it has none
        if log is not None:
            log.append(self.returned)


class _Local(threading.local):
    def __init__(self) -> None:
        self.account = Account()
        self.category = "activations"


_local = _Local()


def account() -> Account:
    """Return the account in which this thread's arrays are counted."""
    return _local.account


def standing() -> tuple[Account, str]:
    """Return this thread's account and category, for `stand_in` of a thread that works for it."""
    return _local.account, _local.category


def stand_in(standing: tuple[Account, str]) -> None:
    """Count what this thread makes from now on as the thread would that `standing` comes from."""
    _local.account, _local.category = standing


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing that this thread makes inside, for what is small and must not be refused."""
    before = standing()
    stand_in((Account(), before[1]))
    try:
        yield
    finally:
        stand_in(before)


def set_limit(nbytes: int) -> None:
    """Let no more than `nbytes` be live in this thread's account; 0 for no limit.

    What would exceed it raises MemoryLimitError before anything is allocated.
    """
    if nbytes < 0:
        raise UserError(f"memory limit {nbytes} must be 0 (no limit) or a number of bytes above")
    _local.account.limit = nbytes


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

    On "cuda" it is CuPy's, which counts through `count_device`. Raises MemoryLimitError.
    """
    dtype = np.dtype(dtype)
    local = _local
    account, category = local.account, category or local.category
    if device != "cpu":
        before, local.category = local.category, category
        try:
            return backend.device_module(device).empty(shape, dtype)
        finally:
            local.category = before
    nbytes = math.prod(shape) * dtype.itemsize
    returned, offset = account.take(category, nbytes), 0
    try:
        if nbytes >= _ALIGN_FROM:
            block = _Block(nbytes + ALIGNMENT, np.uint8)
            offset = -ctypes.addressof(_byte.from_buffer(block)) % ALIGNMENT
        else:
            block = _Block(nbytes, np.uint8)
    except BaseException:
        account.log.append(returned)
        raise
    block.returned, block.log = returned, account.log
    return np.ndarray(shape, dtype, block, offset)


class _DeviceBlock:
    """Memory of a GPU behind arrays, counted until the last of them dies."""

    __slots__ = ("held", "log", "returned")

    def __init__(self, held: Any, log: deque[tuple[str, int]], returned: tuple[str, int]) -> None:
        self.held, self.log, self.returned = held, log, returned

    def __del__(self) -> None:
        self.log.append(self.returned)


def count_device(module: ModuleType) -> None:
    """Let the account of each thread count what CuPy allocates for it, from CuPy's pool.

    That is every array, those that an operation of CuPy's needs on its way too. What `category`
    says at the time is what it counts as.
    """
    cuda, pool = module.cuda, module.get_default_memory_pool()

    def allocate(nbytes: int) -> Any:
        account, category = _local.account, _local.category
        returned = account.take(category, nbytes)
        try:
            held = pool.malloc(nbytes)
        except BaseException as error:
            account.log.append(returned)
            if not isinstance(error, cuda.memory.OutOfMemoryError):
                raise
            most = account.total + cuda.runtime.memGetInfo()[0]
            what, remedy = "what the GPU has for this rank,", "hold less, or use more GPUs"
            raise account.refusal(category, nbytes, most, what, remedy) from None
        block = _DeviceBlock(held, account.log, returned)
        owned = cuda.UnownedMemory(held.ptr, nbytes, block, held.device_id)
        return cuda.MemoryPointer(owned, 0)

    cuda.set_allocator(allocate)


backend.at_import.append(count_device)


def empty_like(
    array: Array, dtype: Any = None, category: str | None = None, device: str = "cpu"
) -> Array:
    """Return an uninitialised array of an array's shape, whose elements lie in its order.

    Images that lie channels last stay so. Counted like `empty`.
    """
    dtype = array.dtype if dtype is None else dtype
    if array.flags.c_contiguous:
        return empty(array.shape, dtype, category, device)
    order = backend.order(array)
    made = empty(tuple([array.shape[i] for i in order]), dtype, category, device)
    return made.transpose(np.argsort(order).tolist())


def adopt(
    region: Any, offset: int, shape: tuple[int, ...], dtype: Any, category: str, owner: Any
) -> Array:
    """Return an array in memory that somebody else has made, counted like one of `empty`.

    region: an object with the buffer interface, kept as long as a view of the array lives.
    owner: what `owner_of` gives for the array and its views. Raises MemoryLimitError.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    account = _local.account
    block = _Block(nbytes, np.uint8, region, offset)
    block.owner = owner
    block.returned = account.take(category, nbytes)
    block.log = account.log  # last: what was not taken is not given back either
    return np.ndarray(shape, dtype, block)


def owner_of(array: Array) -> Any:
    """Return the owner of the memory of an array made by `adopt` or of a view of one, else None."""
    base = array.base
    while type(base) is np.ndarray:
        base = base.base
    return base.owner if type(base) is _Block else None


def zeros(
    shape: tuple[int, ...], dtype: Any, category: str | None = None, device: str = "cpu"
) -> Array:
    """Return an array of zeros, counted like `empty`."""
    array = empty(shape, dtype, category, device)
    array.fill(0)
    return array
