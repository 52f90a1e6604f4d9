"""Files of images that tests write."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

Array = np.ndarray


def bytes_of(count: int = 7, size: tuple[int, ...] = (5, 6), channels: int = 2) -> Array:
    """Random images (N, C, *S) of bytes."""
    return np.random.default_rng(0).integers(0, 256, (count, channels, *size), dtype=np.uint8)


def idx(array: Array) -> bytes:
    """An array in MNIST's format."""
    kinds = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}
    head = struct.pack(f">HBB{array.ndim}I", 0, kinds[array.dtype.name], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, count: int = 20, zipped: bool = True) -> tuple[Array, Array]:
    """A pair of files such as MNIST's; the images (N, H, W) and labels."""
    images, labels = bytes_of(count, channels=1)[:, 0], np.arange(count, dtype=np.uint8) % 4
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content, file = idx(array), folder / f"t10k-{name}-ubyte"
        if zipped:
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
        else:
            file.write_bytes(content)
    return images, labels


def write_pair(folder: Path, images: Array, labels: Array) -> Path:
    """Two .npy files; that of the images."""
    np.save(folder / "labels.npy", labels)
    np.save(folder / "images.npy", images)
    return folder / "images.npy"
