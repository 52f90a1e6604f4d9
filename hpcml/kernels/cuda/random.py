"""Counter-based random numbers, those of the CPU: word for word, and so are masks of dropout."""

from __future__ import annotations

import numpy as np

from hpcml.backend import Array, xp
from hpcml.kernels.cuda.launch import constant, launch, over

_SOURCE = "random.cu"


def random_words(key: int, start: int, out: Array) -> None:
    """out[i] = word number start + i of the stream `key`."""
    numbers = xp(out).empty(0, np.float32)  # words are made by the kernels of any type
    launch(
        _SOURCE, "random_words", numbers, (min(-(-(out.size + 3) // 1024), 4096),), (256,),
        np.uint64(key), np.int64(start), np.int64(out.size), out,
    )  # fmt: skip


def random_uniform(key: int, start: int, out: Array) -> None:
    """out[i] = number start + i of a uniform stream on [0, 1), from 24 random bits."""
    over(_SOURCE, "random_uniform", out, out.size, np.uint64(key), np.int64(start),
         np.int64(out.size), out)  # fmt: skip


def random_normal(key: int, start: int, out: Array) -> None:
    """out[i] = number start + i of a standard normal stream (Box and Muller 1958)."""
    over(_SOURCE, "random_normal", out, out.size, np.uint64(key), np.int64(start),
         np.int64(out.size), out)  # fmt: skip


def dropout(
    x: Array, key: int, first: int, threshold: int, runs: Array, period: int, out: Array
) -> None:
    """out = x / (1 - p) where kept, 0 elsewhere; row r is of sample first + r; threshold = p 2^32.

    runs: (first, count) of neighbours in the whole sample, a NumPy array, again every `period`
    elements.
    """
    rows, n = x.shape
    if not n:
        return
    pack = 16 // x.dtype.itemsize
    launch(
        _SOURCE, "dropout", x, (rows, min(-(-n // (256 * pack)), 4096)), (256,),
        x, np.uint64(key), np.uint64(first), np.uint32(threshold), constant(runs, x),
        np.int64(len(runs)), np.int64(period), np.int64(n), out,
    )  # fmt: skip
