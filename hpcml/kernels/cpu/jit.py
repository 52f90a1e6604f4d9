"""How the CPU kernels are compiled: for one dtype at a time, once per machine, kept on disk.

Flags. `contract` allows fused multiply-add; `nsz` ignores the sign of zero. Neither reorders an
addition, so a loop gives the same bits in its vector body and its scalar tail, wherever a slice
starts; and NaN and infinity keep their meaning, so that a run that diverges says so. Only `lanes`
functions may reorder (`reassoc`): sums and maxima over one row, whose length fixes the order.
`error_model="numpy"` matters: Python's would branch on every division, and nothing would vectorise.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding as llvm
from numba import types

_registry: list[tuple[Any, str]] = []
_FLOATS = {"float32": types.float32, "float64": types.float64}


@functools.cache
def cache_folder() -> Path:
    """Return the folder of compiled code: `$HPCML_CACHE_DIR`, or `hpcml` in the user's cache.

    Its last part is a hash of all that the code depends on (kernel sources, numba, CPU), because
    numba itself looks only at the one source file of a function. A home that cannot be written or
    locked is replaced by a folder of this node.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(f"{numba.__version__} {llvm.get_host_cpu_name()}".encode())
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    name = f"kernels-{digest.hexdigest()}"
    chosen = os.environ.get("HPCML_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for root in (Path(chosen) if chosen else Path(base) / "hpcml", _node_folder()):
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
            with open(root / name / "lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, RuntimeError):
            continue
        return root / name
    return Path(tempfile.mkdtemp(prefix="hpcml-"))


def _node_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hpcml-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder


@contextlib.contextmanager
def _cached_here() -> Iterator[None]:
    """Point numba's cache at our folder while a function is set up, then leave it as it was."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel of a function; in `signature` T is the float type it is compiled for."""

    def make(function: Callable[..., Any]) -> Any:
        with _cached_here():
            compiled = numba.njit(
                fastmath={"contract", "nsz"}, error_model="numpy", nogil=True, cache=True
            )(function)
        _registry.append((compiled, signature))
        return compiled

    return make


def inline(function: Callable[..., Any]) -> Any:
    """Compile a helper into each kernel that calls it."""
    return numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", nogil=True)(function)


def lanes(*more: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a sum (or, with "nnan", a maximum) over one row in as many lanes as the CPU has."""
    flags = {"contract", "nsz", "reassoc", *more}
    return numba.njit(fastmath=flags, error_model="numpy", nogil=True)  # type: ignore[no-any-return]


def load(dtype: str) -> None:
    """Compile all kernels for `dtype`, or read them from disk; other processes wait meanwhile."""
    scope = {"T": _FLOATS[dtype], **{name: getattr(types, name) for name in _NAMES}}
    with open(cache_folder() / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for compiled, signature in _registry:
            compiled.disable_compile(False)
            compiled.compile(eval(signature, scope))
            compiled.disable_compile()  # other types are an error, never a silent new version


_NAMES = ("void", "boolean", "int64", "uint32", "uint64", "float32", "float64", "b1")
