"""Memory by category: every array the package makes is counted, live and at its peak, in bytes.

`empty` is the one allocator. It hands out plain arrays; the bytes are counted down when the last
view of them is gone. The account belongs to the thread, since a rank may be a thread; so does its
limit, beyond which nothing is handed out.
"""

from __future__ import annotations

import ctypes
import gc
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.backend import Array
from hpcml.errors import MemoryLimitError, UserError

CATEGORIES = ("params", "grads", "optim", "activations", "buffers")
ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register
_ALIGN_FROM = 1 << 16  # bytes: below this an unaligned start costs less than finding it out


class Account:
    """Bytes by category: `live[category]` now, `peak[category]` since `reset_peak`.

    `total` and `peak_total` are the same over all categories, and `limit` what `total` may reach
    (0: no limit; see `set_limit`).
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.peak = dict.fromkeys(CATEGORIES, 0)
        self.total = self.peak_total = 0
        self.limit = 0

    def reset_peak(self) -> None:
        """Start a new measurement of the peaks."""
        self.peak = dict(self.live)
        self.peak_total = self.total

    def add(self, category: str, nbytes: int) -> None:
        """Count `nbytes` more (or, if negative, fewer) in `category`."""
        live = self.live[category] + nbytes
        self.live[category] = live
        if live > self.peak[category]:
            self.peak[category] = live
        self.total += nbytes
        if self.total > self.peak_total:
            self.peak_total = self.total

    def require(self, category: str, nbytes: int) -> None:
        """Raise MemoryLimitError if `nbytes` more in `category` would exceed the limit."""
        if self.limit and self.total + nbytes > self.limit:
            gc.collect()  # arrays in cycles of references are nobody's any more
            if self.total + nbytes > self.limit:
                remedy = "hold less, or set a higher limit"
                raise self.refusal(category, nbytes, self.limit, "the memory limit of", remedy)

    def refusal(
        self, category: str, nbytes: int, limit: int, what: str, remedy: str
    ) -> MemoryLimitError:
        """The error for `nbytes` of `category` that exceed `what` there is, `limit` bytes."""
        rows = {**self.live, "in use": self.total, f"asked for ({category})": nbytes,
                "limit": limit}  # fmt: skip
        return MemoryLimitError(
            f"{nbytes:,} bytes of {category} exceed {what} {limit:,}, of which {self.total:,} are "
            f"in use: {remedy}\n"
            f"{table({name: (f'{size:,}',) for name, size in rows.items()}, ('bytes',))}",
            live=self.live, category=category, request=nbytes, limit=limit,
        )  # fmt: skip


def table(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Return the table "where did all the memory go": name -> a text for each column."""
    lines = [("where did all the memory go", *columns)]
    lines += [(f"  {name}", *cells) for name, cells in rows.items()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in lines
    )


_byte: Any = ctypes.c_char  # it gives an array's address faster than the array does


class _Block(np.ndarray[Any, Any]):
    """The bytes behind arrays; NumPy keeps it as their base, so it dies with the last view.

    owner: whose memory it is, where that matters; see `adopt`.
    """

    __slots__ = ("account", "category", "counted", "owner")
    account: Account | None
    category: str
    counted: int
    owner: Any

    def __init__(self, *_: Any) -> None:
        self.account = self.owner = None

    def __del__(self) -> None:
        account = getattr(self, "account", None)  # a copy of it has none
        if account is not None:
            account.live[self.category] -= self.counted
            account.total -= self.counted


class _Local(threading.local):
    def __init__(self) -> None:
        self.account = Account()
        self.category = "activations"


_local = _Local()


def account() -> Account:
    """Return the account of this thread."""
    return _local.account


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
    if account.limit:
        account.require(category, nbytes)
    offset = 0
    if nbytes >= _ALIGN_FROM:
        block = _Block(nbytes + ALIGNMENT, np.uint8)
        offset = -ctypes.addressof(_byte.from_buffer(block)) % ALIGNMENT
    else:
        block = _Block(nbytes, np.uint8)
    _count(block, account, category, nbytes)
    return np.ndarray(shape, dtype, block, offset)


class _DeviceBlock:
    """Memory of a GPU behind arrays, counted until the last of them dies."""

    __slots__ = ("account", "category", "counted", "held")

    def __init__(self, held: Any, account: Account, category: str, nbytes: int) -> None:
        self.held, self.account = held, account
        self.category, self.counted = category, nbytes
        account.add(category, nbytes)

    def __del__(self) -> None:
        self.account.live[self.category] -= self.counted
        self.account.total -= self.counted


def count_device(module: ModuleType) -> None:
    """Let the account of each thread count what CuPy allocates for it, from CuPy's pool.

    That is every array, those that an operation of CuPy's needs on its way too. What `category`
    says at the time is what it counts as.
    """
    cuda, pool = module.cuda, module.get_default_memory_pool()

    def allocate(nbytes: int) -> Any:
        account, category = _local.account, _local.category
        account.require(category, nbytes)
        try:
            held = pool.malloc(nbytes)
        except cuda.memory.OutOfMemoryError:
            most = account.total + cuda.runtime.memGetInfo()[0]
            what, remedy = "what the GPU has for this rank,", "hold less, or use more GPUs"
            raise account.refusal(category, nbytes, most, what, remedy) from None
        block = _DeviceBlock(held, account, category, nbytes)
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
    account.require(category, nbytes)
    block = _Block(nbytes, np.uint8, region, offset)
    block.owner = owner
    _count(block, account, category, nbytes)
    return np.ndarray(shape, dtype, block)


def owner_of(array: Array) -> Any:
    """Return the owner of the memory of an array made by `adopt` or of a view of one, else None."""
    base = array.base
    while type(base) is np.ndarray:
        base = base.base
    return base.owner if type(base) is _Block else None


def _count(block: _Block, account: Account, category: str, nbytes: int) -> None:
    block.category, block.counted = category, nbytes
    account.add(category, nbytes)
    block.account = account  # last: what was not added is not taken off either


def zeros(
    shape: tuple[int, ...], dtype: Any, category: str | None = None, device: str = "cpu"
) -> Array:
    """Return an array of zeros, counted like `empty`."""
    array = empty(shape, dtype, category, device)
    array.fill(0)
    return array
