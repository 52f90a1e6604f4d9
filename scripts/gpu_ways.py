"""A part of the check of the GPU: attention and convolutions by cuDNN, beside our own kernels.

A row says which way was taken, how the results differ, milliseconds of both.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_rows import Row, attempt

from hpcml import backend
from hpcml.kernels.cuda import attention, attention_backward, images
from hpcml.kernels.cuda.cudnn import VARIABLE, library

Pass = Callable[[], Any]
STEPS = 10
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}
"""Of the largest element: some roundings of 16 bits, other orders of sums."""
ATTENTION = 16, 12, 1024, 64
"""Samples, heads, positions and size of a head: GPT-2 124M."""
LAYERS = (
    (64, 224, 3, 64, 7, 2), (64, 56, 64, 64, 3, 1), (64, 56, 256, 128, 1, 1),
    (64, 14, 256, 256, 3, 1),
)  # fmt: skip
"""Samples, pixels, channels, filters, kernel and stride: some of ResNet-50."""


def normal(dtype: Any, *shape: int) -> Any:
    """Standard normal numbers on the GPU."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return backend.device_module("cuda").asarray(values).astype(dtype)


def of_attention(dtype: Any, batch: int, heads: int, length: int, depth: int) -> dict[str, Pass]:
    """The passes of attention on packed projections; each gives what it has written."""

    def packed(count: int) -> Any:
        return normal(dtype, batch, length, count, heads, depth).transpose(2, 0, 3, 1, 4)

    (q, k, v), (g, out), grads = packed(3), packed(2), packed(3)
    lse = normal(np.float32, batch, heads, length)
    how = np.float32(depth**-0.5), True, np.uint64(0), np.uint64(0), np.uint32(0), 0, 0, 0

    def forward() -> Any:
        attention(q, k, v, *how, out, lse)
        return out

    def backward() -> Any:
        attention_backward(q, k, v, out, lse, g, *how, False, *grads)
        return grads

    return {"attention": forward, "attention, backward": backward}


def of_layer(
    dtype: Any, batch: int, pixels: int, channels: int, filters: int, kernel: int, stride: int
) -> dict[str, Pass]:
    """The three passes of a convolution."""
    after = -(-pixels // stride)
    x, w = (
        normal(dtype, batch, pixels, pixels, channels),
        normal(dtype, filters, channels, kernel, kernel),
    )
    g, none = normal(dtype, batch, after, after, filters), normal(dtype, 0)
    how = (stride,) * 2, (kernel // 2,) * 2, (1, 1), 1

    def convolve() -> Any:
        out = g.copy()
        images.convolve(x, w, none, *how, out)
        return out

    def image() -> Any:
        out = x.copy()
        images.convolve_input_gradient(g, w, none, *how, out)
        return out

    def weights() -> Any:
        out = w.copy()
        images.convolve_weight_gradient(g, x, *how, out)
        return out

    name = f"{channels} to {filters} channels, {kernel} x {kernel} / {stride}, {pixels} pixels"
    return {name: convolve, f"{name}, image": image, f"{name}, weights": weights}


def timed(compute: Pass) -> float:
    """The median of milliseconds of a call, waited for."""
    wait = backend.device_module("cuda").cuda.get_current_stream().synchronize
    times = []
    for _ in range(STEPS):
        wait()
        start = time.perf_counter()
        compute()
        wait()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)


def compared(kind: str, compute: Pass) -> Row:
    """One pass both ways."""
    row: Row = {}
    results = []
    for way, column in (("never", "own ms"), ("auto", "ms")):
        os.environ[VARIABLE] = way
        library.forget()
        results.append(compute().astype(np.float32))  # makes the plan too
        row[column] = timed(compute)
    own, other = results
    row["difference"] = float(abs(own - other).max()) / float(abs(own).max())
    if library.reasons:  # our own kernel both times, which shows nothing
        why = "; ".join(library.reasons.values())
        return row | {"way": "our own", "agrees": "not shown", "because": why}
    return row | {"way": library.version(), "agrees": row["difference"] < TOLERANCE[kind]}


def main() -> None:
    """Tell a row for each pass and type."""
    for kind in TOLERANCE:
        dtype = backend.dtype(kind)
        passes = of_attention(dtype, *ATTENTION) if kind == "bf16" else {}  # else our own alone
        for layer in LAYERS:
            passes |= of_layer(dtype, *layer)
        for name, compute in passes.items():
            attempt({"operator": name, "type": kind}, lambda c=compute, k=kind: compared(k, c))


if __name__ == "__main__":
    main()
