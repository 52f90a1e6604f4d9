"""The sources compile for GPUs, where NVIDIA's compiler is installed; no GPU is needed for that."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hpcml.kernels.cuda.launch import FOLDER, text

NVCC = shutil.which("nvcc")
SOURCES = sorted(path.name for path in FOLDER.glob("*.cu"))
# Attention takes long to compile where products are not those of tensor cores.
OTHERS = [source for source in SOURCES if source != "attention.cu"]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc, CUDA's compiler, is not installed")


def compiled(tmp_path: Path, sources: list[str], element: str, *options: str) -> Path:
    """All sources at once: their kernels have names of their own."""
    everything, out = tmp_path / "all.cu", tmp_path / "out"
    everything.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [
        str(NVCC), "-std=c++17", "-Werror", "all-warnings", f"-DELEMENT={element}", "-DDEPTH=32",
        "-I", str(FOLDER), *options, "-o", str(out), str(everything),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return out


@needs_nvcc
@pytest.mark.parametrize(
    ("element", "architecture", "sources", "form"),
    [("f64", 100, OTHERS, "-ptx"), ("f16", 90, ["pointwise.cu"], "-cubin")],
)
def test_sources_compile_without_a_warning(
    element: str, architecture: int, sources: list[str], form: str, tmp_path: Path
) -> None:
    options = f"-arch=sm_{architecture}", form
    assert compiled(tmp_path, sources, element, *options).stat().st_size > 1000


@needs_nvcc
def test_bf16_with_tensor_cores_and_loads_of_16_bytes(tmp_path: Path) -> None:
    options = "-arch=sm_80", "-cubin", "-Xptxas", "-O0", "--keep", "--keep-dir", str(tmp_path)
    assert compiled(tmp_path, SOURCES, "bf16", *options).stat().st_size > 1000
    lines = (tmp_path / "all.ptx").read_text()
    gelu = lines.split(".entry gelu(")[1].split(".entry")[0]
    assert "ld.global.v4" in gelu or "ld.global.nc.v4" in gelu
    assert "st.global.v4" in gelu
    attention = lines.split(".entry attention(")[1].split(".entry")[0]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in attention


def test_sources_need_no_header_of_others() -> None:
    for source in SOURCES:
        assert "#include" not in text(source)
