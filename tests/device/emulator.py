"""CUDA sources compiled by the C++ compiler of the host, and their kernels called on host memory.

`RawModule` and the kernels it gives stand for CuPy's, with more checks: an argument must be exactly
of the type that the kernel declares, a launch within CUDA's limits, and each kernel runs twice,
with its threads in opposite order (`Kernel.orders`), and must write the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hpcml.kernels.cuda.launch import FOLDER, text
from tests.device.standin import streams

HEADER = Path(__file__).with_name("emulate.hpp")
FLAGS = (
    "-std=c++17", "-Og", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-Wno-unused-function", "-Wno-class-memaccess", "-U_FORTIFY_SOURCE",
    # What is out of bounds or not aligned ends the process at once.
    "-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error",
)  # fmt: skip


# "CUDA C++ Programming Guide", technical specifications: of every compute capability from 8.0 on.
GRID = (1 << 31) - 1, 65535, 65535
BLOCK = 1024, 1024, 64
THREADS = 1024
SHARED, MOST_SHARED = 48 << 10, 227 << 10
"""Bytes of shared memory of a block unless its kernel asks for more, and that it can ask for."""


def missing() -> str:
    """Why kernels cannot be run here, or nothing."""
    return "" if shutil.which("g++") else "no g++ to compile kernels for the CPU"


class _Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


class _Call(ctypes.Structure):
    _fields_ = [
        ("blocks", _Dim3),
        ("threads", _Dim3),
        ("shared", ctypes.c_ulonglong),
        ("order", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hpcml-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def library(sources: tuple[str, ...], options: tuple[str, ...]) -> ctypes.CDLL:
    """Sources of kernels as one library of the host; compiled once for all processes of a user."""
    texts = [text(source) for source in sources]
    names = [name for each in texts for name in re.findall(r"^KERNEL (\w+)\(", each, re.MULTILINE)]
    lines = [f'#include "{name}"' for name in (HEADER.name, *sources)]
    program = "\n".join([*lines, *(f"EMULATED({name})" for name in names)])
    key = hashlib.sha256(
        "\0".join([HEADER.read_text(), *texts, *options, *FLAGS, platform.machine()]).encode()
    ).hexdigest()[:24]
    made = _folder() / f"{key}.so"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}")
        folders = "-I", str(HEADER.parent), "-I", str(FOLDER)
        command = ["g++", *FLAGS, *options, *folders, "-x", "c++", "-", "-o", own]
        done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        own.rename(made)
    return ctypes.CDLL(str(made))


class Limits:
    """What CUDA refuses of launches of a kernel."""

    def __init__(self, name: str) -> None:
        self.name, self._shared = name, SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Bytes of shared memory that a launch can have."""
        return self._shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        assert nbytes <= MOST_SHARED, f"{self.name}: no device has {nbytes} bytes of shared memory"
        self._shared = nbytes

    def check(self, grid: Any, block: Any, shared_mem: int) -> None:
        """Fail if it refuses this one."""
        _within(f"{self.name}: grid", grid, GRID)
        _within(f"{self.name}: block", block, BLOCK)
        assert np.prod(block) <= THREADS, f"{self.name}: a block of {block} threads is too large"
        assert shared_mem <= self._shared, (
            f"{self.name}: {shared_mem} bytes of shared memory, but {self._shared} asked for"
        )


class Kernel(Limits):
    """A kernel: call it with a grid, a block and arguments as CuPy's."""

    orders: ClassVar[tuple[int, ...]] = (0, 1)
    """The orders of threads to run in: upwards and downwards."""

    def __init__(self, loaded: ctypes.CDLL, name: str) -> None:
        super().__init__(name)
        self._run, describe = getattr(loaded, f"run_{name}"), getattr(loaded, f"types_{name}")
        describe.restype = ctypes.c_char_p
        self.types = describe().decode().split()

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], shared_mem: int = 0) -> None:
        self.check(grid, block, shared_mem)
        assert len(args) == len(self.types), f"{self.name}: {len(args)} of {self.types}"
        for number, (arg, declared) in enumerate(zip(args, self.types, strict=True)):
            assert _type(arg, declared), f"{self.name}: argument {number}, {declared}, is {arg!r}"
            if hasattr(arg, "memory"):
                streams.touch(arg.memory, write=not declared.startswith("c"))
        arrays = [arg.memory for arg in args if hasattr(arg, "memory")]
        before = [array.copy() for array in arrays]
        results = []
        for order in self.orders:
            for array, old in zip(arrays, before, strict=True):
                if array.flags.writeable:  # NumPy's views of repeated elements are not
                    array[...] = old
            self._start(grid, block, args, shared_mem, order)
            results.append([array.tobytes() for array in arrays])
            for arg in args:
                if hasattr(arg, "memory"):
                    arg.root.check()
        assert len({*map(tuple, results)}) == 1, (
            f"{self.name}: the order of threads makes a difference"
        )

    def _start(self, grid: Any, block: Any, args: Any, shared: int, order: int) -> None:
        held = [_bytes(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(each) for each in held])
        dims = [_Dim3(*(*size, 1, 1)[:3]) for size in (grid, block)]
        code = self._run(ctypes.byref(_Call(*dims, shared, order, pointers)))
        assert code == 0, (
            f"{self.name}: " + ("", "threads wait for ever", "wrote beyond shared memory")[code]
        )


def _within(what: str, sizes: Any, limits: tuple[int, ...]) -> None:
    fits = all(0 < size <= limit for size, limit in zip(sizes, limits, strict=False))
    assert 0 < len(sizes) <= 3 and fits, f"{what} {sizes} is not within {limits}"


def _type(arg: Any, declared: str) -> bool:
    """Whether an argument is what a kernel declares: "*f4", "i8", "V96", ..."""
    declared = declared.removeprefix("c")
    pointer = declared.startswith("*")
    if pointer != hasattr(arg, "memory"):
        return False
    dtype = arg.dtype
    kind = "V" if dtype.itemsize == 2 and dtype.kind in "fV" else dtype.kind
    if isinstance(arg, np.ndarray) and not pointer:
        return arg.shape == () and declared == f"V{dtype.itemsize}"
    return f"{'*' * pointer}{kind}{dtype.itemsize}" == declared


def _bytes(arg: Any) -> Any:
    if hasattr(arg, "memory"):
        return ctypes.c_void_p(arg.data.ptr)
    raw = arg.tobytes()
    return ctypes.create_string_buffer(raw, len(raw))


class RawModule:
    """A source, compiled when a kernel of it is asked for, with all that need the same options."""

    def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
        texts = {path.name: text(path.name) for path in sorted(FOLDER.glob("*.cu"))}
        deep = [name for name, each in texts.items() if "DEPTH" in each]
        (own,) = (name for name, each in texts.items() if each == code)
        others = tuple(name for name in texts if name not in deep)
        self._sources = (own,) if own in deep else others
        self._options = tuple(option for option in options if option.startswith("-D"))

    def get_function(self, name: str) -> Kernel:
        """Return a kernel."""
        return Kernel(library(self._sources, self._options), name)
