"""Which way each operator takes on a GPU, and why: for the doctor's report."""

from __future__ import annotations

from typing import NamedTuple


class Path(NamedTuple):
    """What computes an operator, and what to know of that."""

    way: str
    why: str


PATHS = {
    "products": Path(
        "cuBLAS (gemmEx, gemmStridedBatchedEx)", "sums in float32, tensor cores for 16 bits"
    ),
    "attention": Path(
        "own kernel in tiles",
        "tensor cores for 16 bits (compute capability 8.0 on); heads above 128, of float64 above "
        "64: array expressions; cuDNN is not used yet",
    ),
    "convolution": Path("gathered columns and cuBLAS", "groups one by one; cuDNN is not used yet"),
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
