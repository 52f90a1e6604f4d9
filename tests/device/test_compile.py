"""All that the launcher can ask for compiles for GPUs; no GPU is needed for that.

By NVRTC where CuPy is installed, as on a GPU, else by nvcc. HPCML_COMPILE=all has everything made
machine code, of every architecture but where that takes minutes; otherwise what takes long is
compiled once, or not that far.
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
DEEP = [source for source in SOURCES if "DEPTH" in text(source)]
CASES = [
    (dtype, depth)
    for dtype in ELEMENTS
    for depth in (0, *DEPTHS)
    if needed(depth, backend.dtype(dtype)) <= MOST_SHARED
]
"""All that the launcher can ask for: types of elements, sizes of heads (0 where it matters not)."""
Compile = Callable[[str, int, str], str]


def sources(depth: int) -> list[str]:
    """Those that know of sizes of heads, or the others."""
    return DEEP if depth else [source for source in SOURCES if source not in DEEP]


def by_nvrtc(nvrtc: Any, dtype: str, depth: int, target: str) -> str:
    """PTX for "compute_80", ..., and for "sm_80", ... machine code too, by what CuPy calls."""
    made = []
    for source in sources(depth):
        program = nvrtc.createProgram(text(source), source, (), ())
        try:
            nvrtc.compileProgram(program, (*options(dtype, depth), "-ftz=true", f"-arch={target}"))
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program)[:4000])
        ptx = nvrtc.getPTX(program)
        made.append(ptx if isinstance(ptx, str) else str(ptx, "utf-8"))
    return "".join(made)


def by_nvcc(dtype: str, depth: int, target: str) -> str:
    """The same by the compiler for the command line, for which a warning is an error."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.cu"
        code.write_text("".join(f'#include "{source}"\n' for source in sources(depth)))
        form = ["-ptx"] if target.startswith("compute") else ["-cubin", "--keep"]
        command = [
            str(NVCC), *options(dtype, depth), "-Werror", "all-warnings", f"-arch={target}", *form,
            "-I", str(FOLDER), "--keep-dir", folder, "-o", f"{folder}/out", str(code),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        return (Path(folder) / ("out" if form == ["-ptx"] else "code.ptx")).read_text()


@pytest.fixture(scope="module")
def compiled() -> Compile:
    """Compiles for a target, and gives PTX; anything once."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # noqa: BLE001 (CuPy without NVRTC raises its own kinds)
        if NVCC is None:
            pytest.skip(f"neither NVRTC ({error}) nor nvcc, CUDA's compilers, are installed")
        return functools.cache(by_nvcc)
    return functools.cache(functools.partial(by_nvrtc, nvrtc))


def targets(dtype: str, depth: int) -> list[str]:
    """What to compile for: tiles of types without tensor cores take minutes for the older one."""
    slow = depth and dtype not in HALVES
    if os.environ.get("HPCML_COMPILE") == "all":
        return [f"sm_{architecture}" for architecture in ARCHITECTURES[bool(slow) :]]
    if slow:
        return ["compute_80"] if depth == DEPTHS[0] else []
    kind = "sm" if depth in (0, DEPTHS[-1]) else "compute"
    return [f"{kind}_{ARCHITECTURES[dtype == HALVES[1]]}"]


@pytest.mark.parametrize(("dtype", "depth"), CASES)
def test_sources_compile(dtype: str, depth: int, compiled: Compile) -> None:
    """And tiles have no more shared memory of their own than the launcher takes into account."""
    wanted = targets(dtype, depth)
    if not wanted:
        pytest.skip("takes long: set HPCML_COMPILE=all")
    for target in wanted:
        ptx = compiled(dtype, depth, target)
        assert ".entry" in ptx
        own = sum(map(int, re.findall(r"^\s*\.shared .*\[(\d+)\];", ptx, re.MULTILINE)))
        if depth:
            assert 0 < own <= FIXED


def test_attention_has_tensor_cores_and_loads_of_16_bytes(compiled: Compile) -> None:
    for dtype in HALVES:
        for depth in DEPTHS:
            (target,) = targets(dtype, depth)[:1]
            ptx = compiled(dtype, depth, target)
            for kernel in ("attention", "attention_queries", "attention_keys"):
                lines = ptx.split(f".entry {kernel}(")[1].split(".entry")[0]
                assert f"mma.sync.aligned.m16n8k16.row.col.f32.{ELEMENTS[dtype]}" in lines
                assert "ld.global.v4" in lines or "ld.global.nc.v4" in lines


def test_elements_are_loaded_and_stored_by_16_bytes(compiled: Compile) -> None:
    (target,) = targets("bfloat16", 0)[:1]
    gelu = compiled("bfloat16", 0, target).split(".entry gelu(")[1]
    lines = gelu.split(".entry")[0]
    assert "ld.global.v4" in lines or "ld.global.nc.v4" in lines
    assert "st.global.v4" in lines


def test_sources_need_no_header_of_others() -> None:
    for source in SOURCES:
        assert "#include" not in text(source)
