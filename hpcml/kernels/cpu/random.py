"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "As easy as 1, 2, 3", SC'11).

Four 32-bit words come from a 64-bit key and a 128-bit counter by ten rounds of multiplication, so
that any element of any tensor can be made anywhere, in any order, by any number of ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.kernels.cpu.jit import inline, kernel
from hpcml.kernels.cpu.team import divided, rows

u4, u8 = np.uint32, np.uint64
M0, M1 = u8(0xD2511F53), u8(0xCD9E8D57)
W0, W1 = u4(0x9E3779B9), u4(0xBB67AE85)
LOW, HALF = u8(0xFFFFFFFF), u8(32)
_2PI_32 = 2 * math.pi / 2**32
TILE = 4096  # elements that are made at once, in L1: whole blocks, so that a block is made once


@inline
def philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
    """Return the four words of counter (c0, c1, c2, c3) under a 64-bit key."""
    k0, k1 = u4(key & LOW), u4(key >> HALF)
    for _ in range(10):
        a, b = M0 * u8(c0), M1 * u8(c2)
        c0, c2 = u4(u4(b >> HALF) ^ c1 ^ k0), u4(u4(a >> HALF) ^ c3 ^ k1)
        c1, c3 = u4(b & LOW), u4(a & LOW)
        k0, k1 = u4(k0 + W0), u4(k1 + W1)
    return c0, c1, c2, c3


@inline
def _words(key: Any, first: int, count: int, words: Any) -> None:
    """words[: 4 * count] = the words of the blocks first .. first + count - 1 of a stream."""
    for i in range(count):
        block = u8(first + i)
        w0, w1, w2, w3 = philox(key, u4(block & LOW), u4(block >> HALF), u4(0), u4(0))
        words[4 * i], words[4 * i + 1] = w0, w1
        words[4 * i + 2], words[4 * i + 3] = w2, w3


@kernel("void(uint64, int64, uint32[::1])")
def random_words(key: Any, start: int, out: Any) -> None:
    """out[i] = word number start + i of the stream `key`."""
    words = np.empty(TILE + 4, u4)
    skip = start & 3  # a slice may start within a block
    for done in range(0, out.size, TILE):
        n = min(TILE, out.size - done)
        _words(key, (start + done) >> 2, (skip + n + 3) >> 2, words)
        for i in range(n):
            out[done + i] = words[skip + i]


@kernel("void(uint64, int64, T[::1])")
def random_uniform(key: Any, start: int, out: Any) -> None:
    """out[i] = number start + i of a uniform stream on [0, 1), from 24 random bits."""
    scale = 1.0 / (1 << 24)
    words = np.empty(TILE + 4, u4)
    skip = start & 3
    for done in range(0, out.size, TILE):
        n = min(TILE, out.size - done)
        _words(key, (start + done) >> 2, (skip + n + 3) >> 2, words)
        for i in range(n):
            out[done + i] = (words[skip + i] >> u4(8)) * scale


@kernel("void(uint64, int64, T[::1])")
def random_normal(key: Any, start: int, out: Any) -> None:
    """out[i] = number start + i of a standard normal stream (Box and Muller 1958)."""
    words, normals = np.empty(TILE + 4, u4), np.empty(TILE + 4, np.float64)
    skip = start & 3
    for done in range(0, out.size, TILE):
        n = min(TILE, out.size - done)
        _words(key, (start + done) >> 2, (skip + n + 3) >> 2, words)
        for i in range(skip & 2, skip + n, 2):
            # (word + 1) / 2^32 lies in (0, 1]: the logarithm is finite
            radius = math.sqrt(-2.0 * math.log((words[i] + 1.0) / 4294967296.0))
            angle = _2PI_32 * words[i + 1]
            normals[i], normals[i + 1] = radius * math.cos(angle), radius * math.sin(angle)
        for i in range(n):
            out[done + i] = normals[skip + i]


@inline
def keep_row(
    key: Any, c1: Any, c2: Any, c3: Any, threshold: Any, start: int, n: int, keep: Any
) -> Any:
    """Of words start to start + n - 1 of counter (*, c1, c2, c3): 1 if it is kept, else 0.

    It is kept from `threshold` on. The result is a part of `keep`, which has room for whole blocks
    of words: n + 6 numbers.
    """
    one, zero = keep.dtype.type(1), keep.dtype.type(0)
    first, skip = start >> 2, start & 3
    for block in range((skip + n + 3) >> 2):
        w0, w1, w2, w3 = philox(key, u4(first + block), c1, c2, c3)
        keep[4 * block] = one if w0 >= threshold else zero
        keep[4 * block + 1] = one if w1 >= threshold else zero
        keep[4 * block + 2] = one if w2 >= threshold else zero
        keep[4 * block + 3] = one if w3 >= threshold else zero
    return keep[skip : skip + n]


@divided("void(R[:, ::1], uint64, uint64, uint32, I[:, ::1], int64, T[:, ::1])", rows)
def dropout(
    x: Any, key: Any, first: Any, threshold: Any, runs: Any, period: int, out: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """out = x / (1 - p) where kept, 0 elsewhere; row r is a part of global sample first + r.

    `threshold` is p * 2^32. `runs` (K, 2): first element, in the whole sample, and number of the
    neighbours that a row has one after the other; after the last run come the same ones `period`
    elements further on, until the row ends. The word of an element goes by its place in the whole.
    The gradient is the same function of the output's gradient.
    """
    n, count = x.shape[1], runs.shape[0]
    scale = x.dtype.type(1.0 / (1.0 - threshold / 4294967296.0))
    keep = np.empty(TILE, x.dtype)  # a run within a tile ends with a block
    for r in range(low, high):
        sample = first + u8(r)
        c2, c3 = u4(sample & LOW), u4(sample >> HALF)
        done, run, base = 0, 0, 0
        while done < n:
            place, end = base + runs[run, 0], base + runs[run, 0] + runs[run, 1]
            while place < end:
                tile, within = place // TILE, place % TILE
                m = min(end - place, TILE - within)
                kept = keep_row(key, u4(tile), c2, c3, threshold, within, m, keep)
                given, result = x[r, done : done + m], out[r, done : done + m]
                for j in range(m):
                    result[j] = given[j] * (kept[j] * scale)
                done, place = done + m, place + m
            run += 1
            if run == count:
                run, base = 0, base + period
