"""Random numbers that are a function of (seed, name, index), never of the rank or of the order.

A key is a hash of the seed and names; element i of the stream of a key is made by Philox4x32-10
from the counter i alone, so any rank can make any slice. Dropout takes its counter from the number
of the sample in the whole run, which `samples` sets.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpcml import kernels

_HOST = np.empty(0, np.float32)  # random numbers are made on the host


def key(seed: int, *names: str | int) -> int:
    """Return the 64-bit Philox key of a stream."""
    text = "\0".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def words(key: int, start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the 32-bit words start .. start + count - 1 of a stream."""
    out = np.empty(count, np.uint32)
    kernels.of(_HOST).random_words(np.uint64(key), start, out)
    return out


def uniform(key: int, start: int, out: np.ndarray[Any, Any]) -> None:
    """Fill `out` (any shape, C-contiguous) with elements start, ... of a stream on [0, 1)."""
    assert out.flags.c_contiguous, "a copy would be filled instead"
    kernels.of(out).random_uniform(np.uint64(key), start, out.reshape(-1))


def normal(key: int, start: int, out: np.ndarray[Any, Any]) -> None:
    """Fill `out` (any shape, C-contiguous) with elements start, ... of a standard normal stream."""
    assert out.flags.c_contiguous, "a copy would be filled instead"
    kernels.of(out).random_normal(np.uint64(key), start, out.reshape(-1))


class _State(threading.local):
    """What this thread's random numbers depend on beside names."""

    def __init__(self) -> None:
        self.seed = 0
        self.first = 0  # number of the first sample of the microbatch, counted over the whole run
        self.uses: dict[str, int] = {}  # how often a name drew for these samples
        self.made = 0  # parameters that were given values before they had a name


_state = _State()


def manual_seed(seed: int) -> None:
    """Start afresh from `seed`: parameters and dropout masks that follow depend on it alone."""
    _state.seed, _state.first, _state.uses, _state.made = seed, 0, {}, 0


def seed() -> int:
    """Return the seed of this thread."""
    return _state.seed


def anonymous() -> str:
    """Return a name for a parameter that is used before its model has named it."""
    _state.made += 1
    return f"anonymous {_state.made - 1}"


@contextmanager
def samples(seed: int, first: int) -> Iterator[None]:
    """Compute the samples numbered first, first + 1, ... of a run: sets what dropout depends on."""
    before = (_state.seed, _state.first, _state.uses)
    _state.seed, _state.first, _state.uses = seed, first, {}
    try:
        yield
    finally:
        _state.seed, _state.first, _state.uses = before


@contextmanager
def later(count: int) -> Iterator[None]:
    """Compute the samples from number `count` on of those that are being computed."""
    _state.first += count
    try:
        yield
    finally:
        _state.first -= count


def draw(name: str) -> tuple[int, int]:
    """Return (key, number of the first sample) for the next random mask called `name`.

    A name that draws twice for the same samples gets another key each time.
    """
    use = _state.uses.get(name, 0)
    _state.uses[name] = use + 1
    return key(_state.seed, "mask", name, use), _state.first
