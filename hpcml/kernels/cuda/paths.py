"""Which way each operator takes on a GPU, and why: for the doctor's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hpcml import backend
from hpcml.kernels.cuda import cudnn


class Path(NamedTuple):
    """What computes an operator, and what to know of that."""

    way: str
    why: str


_OWN = {
    "attention": Path(
        "own kernel in tiles",
        "tensor cores for 16 bits (compute capability 8.0 on); heads above 128, of float64 above "
        "64: array expressions",
    ),
    "convolution": Path("gathered columns and cuBLAS", "groups one by one"),
}
_TAKEN = {
    "attention": "16 bits without dropout, positions in multiples of 64",
    "convolution": "sums in float32, no TF32; not float64",
}
"""What cuDNN is given; the rest goes the own way."""
_OTHERS = {
    "products": Path(
        "cuBLAS (gemmEx, gemmStridedBatchedEx)", "sums in float32, tensor cores for 16 bits"
    ),
    "fused operators": Path(
        "own kernels",
        "layer norm, cross-entropy, GELU, dropout, embedding: of 16 bits as they are, without a "
        "copy in float32",
    ),
    "images": Path("own kernels", "batch norm, pooling, resizing: channels last"),
    "optimizers": Path("own kernels", "16-bit gradients onto float32 masters in one pass"),
    "other operators": Path("CuPy", "sums, softmax, arithmetic of elements"),
    "collectives": Path("own algorithms", "sums on the GPU; how messages go: see gpu messages"),
}


def paths(found: Mapping[str, Any]) -> dict[str, Path]:
    """The path of each operator; `found`: what came of `tried`."""
    made = {}
    for name, own in _OWN.items():
        if reason := found["left"].get(name):
            made[name] = Path(own.way, f"{own.why}; cuDNN not: {reason}")
        else:
            made[name] = Path(found["version"], f"{_TAKEN[name]}; else {own.way}")
    return made | _OTHERS


def tried() -> dict[str, Any]:
    """Have cuDNN compute small examples on this GPU; its version, and why an operator fails."""
    device, dtype = backend.device_module("cuda"), backend.dtype("bf16")
    x, g = (device.zeros((1, 2, 64, 16), dtype) for _ in range(2))
    out, *grads = (device.zeros_like(x) for _ in range(4))
    lse = device.zeros(x.shape[:3], "float32")
    cudnn.attention(x, x, x, 1.0, True, 0, out, lse)
    cudnn.attention_backward(x, x, x, out, lse, g, 1.0, True, 0, False, *grads)
    image, made = (device.zeros((1, 8, 8, 16), dtype) for _ in range(2))
    weight, how = device.zeros((16, 16, 3, 3), dtype), ((1, 1), (1, 1), (1, 1))
    cudnn.convolve(image, weight, weight[:0], *how, made)
    cudnn.convolve_input_gradient(made, weight, weight[:0], *how, image)
    cudnn.convolve_weight_gradient(made, image, *how, weight)
    device.cuda.Device().synchronize()
    return {"version": cudnn.version(), "left": dict(cudnn.reasons)}
