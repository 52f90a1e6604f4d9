"""Compiling the sources of this folder for the device at hand, and launching what is in them.

NVRTC compiles a source when a kernel of it is first asked for, once for each type of elements, and
CuPy keeps the result on disk. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hpcml.backend import Array, xp

FOLDER = Path(__file__).parent
ELEMENTS = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
"""Types of elements, by the names that the sources give them."""

WARP = 32
_THREADS = 256
_BLOCKS = 4096  # of a kernel over elements: enough for any device, each goes on with what is left


@functools.cache
def text(source: str) -> str:
    """A source with what it includes in its place: NVRTC then needs no folder to look in."""
    lines = (FOLDER / source).read_text(encoding="utf-8").splitlines()
    begin = '#include "'
    return "\n".join(
        text(line[len(begin) : -1]) if line.startswith(begin) else line
        for line in lines
        if line != "#pragma once"
    )


def options(dtype: str, depth: int) -> tuple[str, ...]:
    """What the compiler is told for a type of elements, and for a size of heads if there is one."""
    sized = (f"-DDEPTH={depth}",) if depth else ()
    return ("-std=c++17", f"-DELEMENT={ELEMENTS[dtype]}", *sized)


@functools.cache
def module(device: ModuleType, source: str, dtype: str, depth: int) -> Any:
    """A source for a type of elements, and a size of heads if it asks for one; not compiled yet."""
    return device.RawModule(code=text(source), options=options(dtype, depth))


@functools.cache
def _kernel(
    device: ModuleType, number: int, source: str, name: str, dtype: str, depth: int, shared: int
) -> Any:
    """A kernel; number: of the device, each of which is asked for shared memory."""
    found = module(device, source, dtype, depth).get_function(name)
    if shared:  # without asking it has at most 48 KiB, those included that it declares itself
        found.max_dynamic_shared_size_bytes = shared
    return found


def launch(
    source: str, name: str, like: Array, grid: tuple[int, ...], block: tuple[int, ...], *args: Any,
    depth: int = 0, shared: int = 0,
) -> None:  # fmt: skip
    """Start a kernel on the current stream, compiled for the dtype of `like`; nothing if no block.

    args: arrays, NumPy's scalars and records, of exactly the types that the kernel takes.
    """
    if 0 in (*grid, *block):
        return
    kernel = _kernel(
        xp(like), like.device.id, source, name, like.dtype.name, depth, shared
    )  # fmt: skip
    kernel(grid, block, args, shared_mem=shared)


def over(source: str, name: str, like: Array, count: int, *args: Any) -> None:
    """Start a kernel over `count` elements of the type of `like`, some packs of them a thread."""
    packs = -(-count * like.dtype.itemsize // 16)
    launch(source, name, like, (min(-(-packs // _THREADS), _BLOCKS),), (_THREADS,), *args)


def sum_type(like: Array) -> np.dtype[Any]:
    """The type of arithmetic with these elements: float32, and float64 for float64."""
    return np.dtype(np.float64 if like.dtype == np.float64 else np.float32)


def aligned(*arrays: Array) -> bool:
    """Whether each of these arrays starts at a multiple of 16 bytes."""
    return all(array.data.ptr % 16 == 0 for array in arrays)


def share(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An uninitialised array for what a kernel needs beside its arguments."""
    return xp(like).empty(shape, dtype)


def constant(values: np.ndarray[Any, Any], like: Array) -> Array:
    """A NumPy array where `like` lies, copied once for each stream: another would have to wait."""
    module = xp(like)
    stream = module.cuda.get_current_stream().ptr
    return _constant(module, like.device.id, stream, values.tobytes(), values.dtype.str)


@functools.lru_cache(256)
def _constant(module: ModuleType, device: int, stream: int, values: bytes, dtype: str) -> Array:
    return module.asarray(np.frombuffer(values, dtype))
