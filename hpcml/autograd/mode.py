"""How operations are recorded for now: whether at all, and through what their saved arrays pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpcml.backend import Array

Noted = Callable[[Array], None]
Watch = Callable[[str, tuple[Any, ...], dict[str, Any]], Noted | None]
"""Called before a use of a primitive, with its name, inputs and attributes; what it returns, if
anything, is called with the result."""


class _Mode(threading.local):
    def __init__(self) -> None:
        self.recording = True
        self.pack: Callable[[Array], Any] | None = None
        self.unpack: Callable[[Any], Array] | None = None
        self.watch: Watch | None = None


mode = _Mode()


@contextmanager
def no_grad() -> Iterator[None]:
    """Compute without recording: results need no gradient and nothing is saved."""
    before, mode.recording = mode.recording, False
    try:
        yield
    finally:
        mode.recording = before


@contextmanager
def enable_grad() -> Iterator[None]:
    """Record inside the block even where a surrounding `no_grad` does not."""
    before, mode.recording = mode.recording, True
    try:
        yield
    finally:
        mode.recording = before


@contextmanager
def watching(watch: Watch | None) -> Iterator[None]:
    """Call `watch` at each use of a primitive; None: nothing that was to be called before."""
    before, mode.watch = mode.watch, watch
    try:
        yield
    finally:
        mode.watch = before


def watched(name: str, inputs: tuple[Any, ...], make: Callable[[], Array], **how: Any) -> Array:
    """`make()`, shown to who watches like a use of a primitive, for what has no gradient."""
    noted = None if mode.watch is None else mode.watch(name, inputs, how)
    out = make()
    if noted is not None:
        noted(out)
    return out


@contextmanager
def saved_tensors_hooks(
    pack: Callable[[Array], Any], unpack: Callable[[Any], Array]
) -> Iterator[None]:
    """Pass each array saved for backward through `pack` when saved and `unpack` when needed.

    `pack(array)` may return anything; `unpack` must return an array of the same shape and dtype. It
    is called once for each array, when the first adjoint of that use asks. Parameters are saved by
    reference and do not pass through. Checkpointing, offloading and compression of activations are
    built on this seam.
    """
    before = (mode.pack, mode.unpack)
    mode.pack, mode.unpack = pack, unpack
    try:
        yield
    finally:
        mode.pack, mode.unpack = before
