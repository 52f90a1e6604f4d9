"""Parts of the check of the GPU: training steps of GPT-2 124M and ResNet-50, beside PyTorch.

`python scripts/gpu_steps.py gpt2` measures each contender in a process of its own, so that none has
the memory of another, and none ends with another: `... gpt2 "torch.compile"` is one of them.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_rows import Row, asked, attempt, follow, say, shares, tell

CONTENDERS = ("hpcml", "PyTorch eager", "torch.compile")
PEAKS = {
    r"A100([- ](SXM4|PCIE))?[- ](40|80)GB( PCIe)?": (312e12, "NVIDIA's A100 data sheet"),
    r"H100 PCIe": (756e12, "NVIDIA's H100 data sheet, PCIe"),
    r"H100 NVL": (835e12, "NVIDIA's H100 data sheet, NVL"),
    r"H100 (80GB|96GB) HBM3": (989e12, "NVIDIA's H100 data sheet, SXM"),
    r"H200 NVL": (835e12, "NVIDIA's H200 data sheet, NVL"),
    r"H200": (989e12, "NVIDIA's H200 data sheet, SXM"),
    r"GH200 \d+GB?( HBM3e)?": (989e12, "NVIDIA's GH200 data sheet"),
    r"B200": (2250e12, "NVIDIA's HGX data sheet, B200 at 1000 W"),
    r"GB200": (2500e12, "NVIDIA's GB200 data sheet"),
}
"""Dense bf16 operations a second by the whole name of a GPU after "NVIDIA", and where from.

Data sheets of Hopper and Blackwell give twice that, with sparsity. A slice of a GPU (MIG) has
another name, and no figure here."""
STEPS, WARM = 20, 5
EAGER = 1.0
"""How many times as fast as PyTorch eager the step of GPT-2 is to be."""


def peak_of(name: str) -> tuple[float, str]:
    """The bf16 peak of a GPU and where it is from; 0 and why, if its name does not say which."""
    for pattern, found in PEAKS.items():
        if re.fullmatch(f"NVIDIA {pattern}", name):
            return found
    return 0.0, f"not known for {name!r}, hence no utilisation"


def timed(step: Callable[[], Any], wait: Callable[[], Any]) -> float:
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


@dataclass(frozen=True)
class Work:
    """What a step takes: a batch, the operations of it by the model's shapes, samples in units."""

    batch: tuple[Any, Any]
    flops: float
    units: int
    unit: str


@dataclass(frozen=True)
class Gpt:
    """GPT-2 124M, bf16 with float32 masters (PyTorch: autocast)."""

    batch: int = 16
    block: int = 1024
    vocab: int = 50304
    layers: int = 12
    heads: int = 12
    width: int = 768

    def work(self) -> Work:
        """Random tokens, those that follow, and operations.

        Chowdhery et al. 2022, "PaLM", appendix B: 6 N + 12 L T C operations a token, where N counts
        the parameters that matrices are multiplied by: not the positions' embeddings.
        """
        tokens = np.random.default_rng(0).integers(0, self.vocab, (self.batch, self.block + 1))
        count = 12 * self.layers * self.width**2 + self.vocab * self.width
        each = 6 * count + 12 * self.layers * self.block * self.width
        units = self.batch * self.block
        return Work((tokens[:, :-1].copy(), tokens[:, 1:].copy()), units * each, units, "tokens")

    def ours(self) -> tuple[Any, Any, dict[str, Any]]:
        """Our model, its loss, and how it is trained."""
        import hpcml
        from hpcml.models import GPT, NextTokenLoss

        model = GPT(self.vocab, self.block, self.layers, self.heads, self.width, bias=False)
        how = {"optimizer": hpcml.optim.AdamW, "lr": 1e-4, "grad_clip": 1.0}
        return model, NextTokenLoss(), how

    def torch(self, compiled: bool, device: str) -> Callable[[Any, Any], Any]:
        """PyTorch's step on a batch."""
        import torch

        from hpcml.bench.step import Size
        from hpcml.bench.torch_peer import TorchGPT

        size = Size(self.layers, self.heads, self.width, self.block, self.batch)
        model = TorchGPT(size, self.vocab).to(device)
        fused = device == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        forward = torch.compile(model) if compiled else model

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = forward(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss

        return step


@dataclass(frozen=True)
class Resnet:
    """ResNet-50 on random images, bf16 with float32 masters (PyTorch: autocast, channels last)."""

    batch: int = 64
    pixels: int = 224
    depth: int = 50

    def work(self) -> Work:
        """Random images and labels; products and sums of its layers at 224 pixels, three times."""
        random = np.random.default_rng(0)
        images = random.standard_normal((self.batch, 3, self.pixels, self.pixels), np.float32)
        labels = random.integers(0, 1000, self.batch)
        return Work((images, labels), 3 * 2 * 4.089e9 * self.batch, self.batch, "images")

    def ours(self) -> tuple[Any, Any, dict[str, Any]]:
        """Our model, its loss, and how it is trained."""
        import hpcml
        from hpcml.models import ResNet

        how = {"optimizer": hpcml.optim.SGD, "lr": 1e-2, "momentum": 0.9}
        return ResNet(3, 1000, depth=self.depth), hpcml.nn.CrossEntropyLoss(), how

    def torch(self, compiled: bool, device: str) -> Callable[[Any, Any], Any]:
        """PyTorch's step on a batch."""
        import torch

        from tests.models.peer_images import PeerResNet  # a bare machine has no torchvision

        model = PeerResNet(3, 1000, self.depth, 64, False).to(device)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        forward = torch.compile(model) if compiled else model

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return step


TASKS: dict[str, Any] = {"gpt2": Gpt(), "resnet50": Resnet()}


def our_step(task: Any, work: Work) -> Callable[[], float]:
    """Our step, which gives its loss. Its batch lies on the GPU, as PyTorch's does."""
    import cupy

    import hpcml
    from hpcml import backend

    model, loss, how = task.ours()
    bf16 = backend.dtype("bf16")
    step = hpcml.parallelize(model.to(bf16).to("cuda"), loss=loss, **how)
    x, y = (cupy.asarray(part) for part in work.batch)
    batch = (x.astype(bf16) if x.dtype == np.float32 else x), y
    return lambda: step(batch)


def of_hpcml(task: Any) -> Row:
    """Our step, measured."""
    import cupy

    from hpcml import memory

    work = task.work()
    step = our_step(task, work)
    last = [0.0]

    def call() -> None:
        last[0] = step()

    memory.account().reset_peak()
    seconds = timed(call, cupy.cuda.get_current_stream().synchronize)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return measured(work, seconds, memory.account().peak_total, last[0], name)


def of_torch(task: Any, compiled: bool, device: str = "cuda") -> Row:
    """PyTorch's step, measured."""
    import torch

    work, step = task.work(), task.torch(compiled, device)
    batch = [torch.from_numpy(part).to(device) for part in work.batch]
    if batch[0].ndim == 4:
        batch[0] = batch[0].to(memory_format=torch.channels_last)
    last = [0.0]

    def call() -> None:
        last[0] = step(*batch).item()  # every step waits for its loss, as ours does

    if device == "cpu":
        return measured(work, timed(call, lambda: None), 0, last[0], "CPU")
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(call, torch.cuda.synchronize)
    name = torch.cuda.get_device_name()
    return measured(work, seconds, torch.cuda.max_memory_allocated(), last[0], name)


def measured(work: Work, seconds: float, memory: int, loss: float, gpu: str) -> Row:
    """A contender's figures. A loss that is no number fails: then nothing was trained."""
    peak = peak_of(gpu)[0]
    return {
        "ms": round(1e3 * seconds, 2), f"{work.unit}/s": round(work.units / seconds),
        "MFU %": round(100 * work.flops / seconds / peak, 1) if peak else "",
        "peak GiB": round(memory / 2**30, 2), "loss": round(loss, 4), "agrees": loss == loss,
    }  # fmt: skip


def compare(task: str) -> None:
    """Measure all contenders of a task, one after the other, and say what was asked for."""
    rows: dict[str, Row] = {}
    for contender, limit in shares(CONTENDERS, (3, 3, 2)):  # the first two are compared

        def each(row: Row, contender: str = contender) -> None:
            rows[contender] = row
            if "ms" in row and "ms" in rows.get("hpcml", {}):
                row["ours is faster by"] = round(row["ms"] / rows["hpcml"]["ms"], 3)
            tell(row)

        failure = follow([sys.executable, __file__, task, contender], limit, os.environ, each)
        if contender not in rows:
            each({"contender": contender, "error": (failure or "nothing told")[:300]})
        if task == "gpt2" and contender == "PyTorch eager":
            ratio = rows[contender].get("ours is faster by")
            asked("GPT-2 124M, steps of ours by those of PyTorch eager", EAGER, ratio)


def contend(task: str, contender: str) -> None:
    """Tell the row of one contender."""
    measure = {"hpcml": of_hpcml, "PyTorch eager": lambda task: of_torch(task, False)}.get(
        contender, lambda task: of_torch(task, True)
    )
    attempt({"contender": contender}, lambda: measure(TASKS[task]))


def gpu_name() -> str:
    """What nvidia-smi calls the first GPU, without starting anything on it."""
    from gpu_machine import said

    return said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        contend(*sys.argv[1:])
    else:
        peak, source = peak_of(gpu_name())
        say(**{"bf16 peak": f"{peak / 1e12:g} TFLOP/s by {source}" if peak else source})
        compare(sys.argv[1])
