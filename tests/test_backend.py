"""Array modules, dtypes, threads."""

from __future__ import annotations

import builtins
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import threadpoolctl

from hpcml import backend
from hpcml.errors import UserError
from tests.device import standin

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CuPy, whatever this one has."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> ModuleType:
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'")
        return real(name, *args, **more)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    backend.device_module.cache_clear()


def test_numpy_serves_arrays_and_scalars_of_numpy() -> None:
    for value in (np.ones(3), np.float32(1), np.ma.masked_array([1])):
        assert backend.xp(value) is np
    assert backend.device_module("cpu") is np


@pytest.mark.usefixtures("no_cupy")
def test_without_cupy_cuda_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"needs CuPy .*install hpcml\[") as info:
        backend.device_module("cuda")
    assert "\n" not in str(info.value)
    assert 'device.kind="cpu"' in str(info.value)


def test_an_unknown_device_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r'device\.kind="tpu" is unknown: set "cpu" or "cuda"'):
        backend.device_module("tpu")


def test_cupy_serves_its_own_arrays() -> None:
    with standin.installed() as cupy:
        array = cupy.ones(3)
        assert backend.xp(array) is cupy
        assert backend.is_array(array) and backend.kind(array) == "cuda"
        assert backend.numbers([array[0], array[1:2].sum()]) == [1, 1]


def test_what_is_an_array() -> None:
    assert backend.is_array(np.empty(0))
    assert not any(map(backend.is_array, [1.0, [1.0], None, np.float32(1)]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp64", np.float64), ("fp32", np.float32), ("fp16", np.float16),
        ("bf16", ml_dtypes.bfloat16), ("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32),
        (np.float64, np.float64), (np.dtype("int64"), np.int64),
    ],
)  # fmt: skip
def test_names_of_dtypes(name: Any, expected: Any) -> None:
    assert backend.dtype(name) == np.dtype(expected)


@pytest.mark.parametrize("name", ["fp8", "flaot32", ""])
def test_an_unknown_dtype_is_an_error_with_a_remedy(name: str) -> None:
    with pytest.raises(UserError, match="is unknown: use one of fp64, fp32, bf16, fp16") as info:
        backend.dtype(name)
    assert repr(name) in str(info.value)


THREADS = """
import sys
import numpy as np, threadpoolctl
from hpcml import backend
if "{order}" == "after":
    import numba
backend.set_threads(2)
import numba
def blas():
    return {{p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"}}
assert backend.threads() == 2 and blas() == {{1}}, blas()  # our own threads divide the products
assert numba.get_num_threads() <= 2, numba.get_num_threads()
backend.set_threads(1)
assert backend.threads() == 1 and blas() == {{1}}, blas()
assert numba.get_num_threads() == 1
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_threads_are_limited_whether_numba_is_loaded_or_not(order: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", THREADS.format(order=order)],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [0, -1, 10**14])
def test_a_number_of_threads_that_cannot_be(count: int) -> None:
    before = backend.threads(), os.environ.get("OMP_NUM_THREADS")
    with pytest.raises(UserError, match=f"threads={count}: give a rank at least 1"):
        backend.set_threads(count)
    assert (backend.threads(), os.environ.get("OMP_NUM_THREADS")) == before


def test_set_threads_holds_for_what_is_loaded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threadpoolctl.threadpool_info()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("NUMBA_NUM_THREADS", os.environ.get("NUMBA_NUM_THREADS", "1"))
    backend.set_threads(1)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    threadpoolctl.threadpool_limits({p["prefix"]: p["num_threads"] for p in before})


def test_importing_the_foundation_is_quick_and_compiles_nothing() -> None:
    code = (
        "import sys, hpcml.backend, hpcml.memory, hpcml.rng, hpcml.kernels;"
        "assert not {'numba', 'llvmlite', 'mpi4py', 'cupy', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


HEAP = """
import numpy as np
from hpcml import backend
backend.keep_freed_memory()
array = np.empty(64 << 20, np.uint8)  # glibc would map, and unmap, anything above 32 MiB
with open("/proc/self/maps") as maps:
    heap = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]")]
print(any(int(first, 16) <= array.ctypes.data < int(last, 16) for first, last in heap))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_large_arrays_come_from_the_heap_that_keeps_freed_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAP],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"
