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
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding as llvm
from numba import types
from numba.core.registry import cpu_target

_registry: list[tuple[Any, str]] = []
_loading = threading.Lock()  # ranks may be threads
_FLOATS = {"float32": types.float32, "float64": types.float64}


def _use_whole_vectors() -> None:
    """Let LLVM use the 512-bit registers of CPUs for which it would take half of them.

    It does so for Intel's, because long ago they ran slower then. Without effect where numba has
    compiled something before; what a user says of features (NUMBA_CPU_FEATURES, NUMBA_CPU_NAME,
    NUMBA_ENABLE_AVX) has the last word.
    """
    features, config = llvm.get_host_cpu_features(), numba.config
    theirs = config.CPU_FEATURES is not None or config.CPU_NAME is not None or not config.ENABLE_AVX
    if not theirs and features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_use_whole_vectors()


@functools.cache
def cache_folder() -> Path:
    """Return the folder of compiled code: `$HPCML_CACHE_DIR`, or `hpcml` in the user's cache.

    Its last part is a hash of all that the code depends on (kernel sources, Python, numba, CPU),
    because numba itself looks only at the one source file of a function. A folder that cannot be
    written or locked is replaced by one of this node.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        digest.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    cpu = cpu_target.target_context.codegen().magic_tuple()
    digest.update(f"{sys.implementation.cache_tag} {numba.__version__} {cpu}".encode())
    name = f"kernels-{digest.hexdigest()}"
    for root in (_user_folder, _node_folder):
        try:
            folder = root() / name
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (OSError, RuntimeError):
            continue
        return folder
    return Path(tempfile.mkdtemp(prefix="hpcml-"))


def _user_folder() -> Path:
    chosen, caches = os.environ.get("HPCML_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path(caches or Path.home() / ".cache") / "hpcml"


def _node_folder() -> Path:
    """Return a folder that nobody else can write: what lies in it is run."""
    folder = Path(tempfile.gettempdir()) / f"hpcml-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise OSError(f"{folder} is open to other users")
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
    """Make a kernel of a function.

    In `signature` T is the float type it is compiled for, R the same for arrays that may be
    read-only, I such an array of int64, H one of uint16, B of uint8; Job is a tuple of arguments.
    """

    def make(function: Callable[..., Any]) -> Any:
        made = compiled(function)
        register(made, signature)
        return made

    return make


def compiled(function: Callable[..., Any]) -> Any:
    """Let a function be compiled, for the signatures that are registered, and kept on disk."""
    with _cached_here():
        made: Any = numba.njit(
            fastmath={"contract", "nsz"}, error_model="numpy", nogil=True, cache=True
        )(function)
    made._compile_for_args = functools.partial(_after_loading, made)
    return made


def _after_loading(made: Any, *args: Any) -> Any:
    """Return what numba shall call with types for which it would compile a version, if it may.

    It may only while kernels are loaded: this thread has come to call one at that moment.
    """
    with _loading:
        return made


def register(function: Any, signature: str) -> None:
    """Compile a function for a signature, written as for `kernel`, when kernels are loaded."""
    _registry.append((function, signature))


def address(made: Any) -> int:
    """The address of what a function was compiled to, by numba's calling convention."""
    return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


def inline(function: Callable[..., Any]) -> Any:
    """Compile a helper into each kernel that calls it."""
    return numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", nogil=True)(function)


def lanes(function: Callable[..., Any]) -> Any:
    """Compile a sum or maximum over one row in as many lanes as the CPU has."""
    flags = {"contract", "nsz", "reassoc"}
    return numba.njit(fastmath=flags, error_model="numpy", nogil=True)(function)


def load(dtype: str) -> None:
    """Read all kernels for `dtype` from disk; what is missing one process compiles for all.

    All are those of the modules that have been imported: call it again after others. A file that
    cannot be read (of a machine that lost power, say) is made again. Who finds all there does not
    wait for another that compiles for another dtype: numba replaces files, it changes none.
    """
    folder = cache_folder()
    complete = folder / f"{dtype}-{len(_registry)}-complete"
    with _loading, open(folder / "lock", "a") as lock:
        if not complete.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if complete.exists():  # maybe since another has done it: all read at once
            fcntl.flock(lock, fcntl.LOCK_UN)
            with contextlib.suppress(Exception):  # damaged: pickle raises nearly anything
                _compile(dtype)
                return
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _compile(dtype, mend=True):
            complete.touch()


def _compile(dtype: str, mend: bool = False) -> bool:
    """Read or compile all kernels; return whether all of them could be saved."""
    real = _FLOATS[dtype]
    scope = {"T": real, "R": _ReadOnly(real), "I": _ReadOnly(types.int64)}
    scope |= {"H": _ReadOnly(types.uint16), "B": _ReadOnly(types.uint8)}
    scope |= {name: getattr(types, name) for name in _NAMES}
    scope["Job"] = _job
    saved = True
    for compiled, text in _registry:
        signature = eval(text, scope)
        compiled.disable_compile(False)
        try:
            compiled.compile(signature)
        except Exception:
            if signature.args in compiled.overloads:
                saved = False  # compiled, but the disk is full
            elif mend:
                _forget(compiled.py_func.__name__)
                compiled.compile(signature)
            else:
                raise
        finally:
            compiled.disable_compile()  # other types are an error, never a silent new version
    return saved


def _forget(name: str) -> None:
    """Remove what the disk has of a kernel, for all dtypes."""
    for pattern in (f"*.{name}-*.nb[ci]", "*-complete"):
        for file in cache_folder().rglob(pattern):
            file.unlink()


def _job(arguments: tuple[Any, ...]) -> Any:
    """The type of a tuple of arguments that is handed on: it does not say what is written."""
    arrays = (t.copy(readonly=True) if isinstance(t, types.Array) else t for t in arguments)
    return types.BaseTuple.from_types(tuple(arrays))


class _ReadOnly:
    """Subscripts like those of a numba type, for arrays that the kernel only reads."""

    def __init__(self, element: Any) -> None:
        self.element = element

    def __getitem__(self, dimensions: Any) -> Any:
        array = self.element[dimensions]
        return types.Array(array.dtype, array.ndim, array.layout, readonly=True)


_NAMES = ("void", "boolean", "int64", "uint32", "uint64", "float32", "float64", "uint8", "uint16")
