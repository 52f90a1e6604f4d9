"""All that the launcher can ask for compiles for GPUs; no GPU is needed for that.

By NVRTC where CuPy is installed, as on a GPU, else by nvcc. HPCML_COMPILE=all has everything made
machine code of every architecture; otherwise what takes long is compiled once, or not that far.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcml import backend
from hpcml.kernels.cuda.attention import DEPTHS, FIXED, MOST_SHARED, needed
from hpcml.kernels.cuda.launch import ELEMENTS, FOLDER, options, text

NVCC = shutil.which("nvcc")
SOURCES = sorted(path.name for path in FOLDER.glob("*.cu"))
ARCHITECTURES = 80, 90
HALVES = "bfloat16", "float16"
Compile = Callable[[str, str, int, str], str]


def asked_for() -> list[tuple[str, str, int]]:
    """Sources, types of elements and, where the source knows of it, the size of heads."""
    return [
        (source, dtype, depth)
        for source in SOURCES
        for dtype in ELEMENTS
        for depth in (DEPTHS if "DEPTH" in text(source) else (0,))
        if needed(depth, backend.dtype(dtype)) <= MOST_SHARED
    ]


def by_nvrtc(nvrtc: Any, source: str, dtype: str, depth: int, target: str) -> str:
    """PTX for "compute_80", ..., and for "sm_80", ... machine code too, by what CuPy calls."""
    program = nvrtc.createProgram(text(source), source, (), ())
    try:
        nvrtc.compileProgram(program, (*options(dtype, depth), "-ftz=true", f"-arch={target}"))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program)[:4000])
    ptx = nvrtc.getPTX(program)
    return ptx if isinstance(ptx, str) else str(ptx, "utf-8")


def by_nvcc(source: str, dtype: str, depth: int, target: str) -> str:
    """The same by the compiler for the command line, for which a warning is an error."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.cu"
        code.write_text(text(source))
        form = ["-ptx"] if target.startswith("compute") else ["-cubin", "--keep"]
        command = [
            str(NVCC), *options(dtype, depth), "-Werror", "all-warnings", f"-arch={target}", *form,
            "--keep-dir", folder, "-o", f"{folder}/out", str(code),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        return (Path(folder) / ("out" if form == ["-ptx"] else "code.ptx")).read_text()


@pytest.fixture(scope="module")
def compiled() -> Compile:
    """Compiles for a target, and gives PTX; anything once."""
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        if NVCC is None:
            pytest.skip("neither CuPy nor nvcc, CUDA's compiler, is installed")
        return functools.cache(by_nvcc)
    return functools.cache(functools.partial(by_nvrtc, nvrtc))


def targets(source: str, dtype: str, depth: int) -> list[str]:
    """What to compile for: tiles of types without tensor cores take a minute for each target."""
    if os.environ.get("HPCML_COMPILE") == "all":
        return [f"sm_{architecture}" for architecture in ARCHITECTURES]
    if depth and dtype not in HALVES:
        return ["compute_80"] if depth == DEPTHS[0] else []
    return [f"sm_{ARCHITECTURES[dtype == HALVES[1]]}"]


@pytest.mark.parametrize(("source", "dtype", "depth"), asked_for())
def test_a_source_compiles(source: str, dtype: str, depth: int, compiled: Compile) -> None:
    """And has no more shared memory of its own than the launcher takes into account."""
    wanted = targets(source, dtype, depth)
    if not wanted:
        pytest.skip("takes long: set HPCML_COMPILE=all")
    for target in wanted:
        ptx = compiled(source, dtype, depth, target)
        assert ".entry" in ptx
        own = sum(map(int, re.findall(r"^\s*\.shared .*\[(\d+)\];", ptx, re.MULTILINE)))
        if depth:
            assert 0 < own <= FIXED


def test_attention_has_tensor_cores_and_loads_of_16_bytes(compiled: Compile) -> None:
    for dtype in HALVES:
        for depth in DEPTHS:
            (target,) = targets("attention.cu", dtype, depth)[:1]
            ptx = compiled("attention.cu", dtype, depth, target)
            for kernel in ("attention", "attention_queries", "attention_keys"):
                lines = ptx.split(f".entry {kernel}(")[1].split(".entry")[0]
                assert f"mma.sync.aligned.m16n8k16.row.col.f32.{ELEMENTS[dtype]}" in lines
                assert "ld.global.v4" in lines or "ld.global.nc.v4" in lines


def test_elements_are_loaded_and_stored_by_16_bytes(compiled: Compile) -> None:
    (target,) = targets("pointwise.cu", "bfloat16", 0)[:1]
    gelu = compiled("pointwise.cu", "bfloat16", 0, target).split(".entry gelu(")[1]
    lines = gelu.split(".entry")[0]
    assert "ld.global.v4" in lines or "ld.global.nc.v4" in lines
    assert "st.global.v4" in lines


def test_sources_need_no_header_of_others() -> None:
    for source in SOURCES:
        assert "#include" not in text(source)
