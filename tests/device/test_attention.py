"""Attention on a GPU, run on the CPU, against its specification in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from hpcml.kernels import generic
from tests.device import emulator
from tests.device.support import FIRST, KEY, Numbers, few, of_types

ATTENTION = [  # batch, heads, queries, keys, depth
    (1, 1, 1, 1, 1), (1, 2, 66, 70, 16), (2, 2, 5, 33, 24), (1, 1, 66, 3, 7), (0, 1, 4, 4, 4),
]  # fmt: skip
PLAIN = 0, 0, 0, 0, 0, 0
MASKED = KEY, FIRST, np.uint32(0.3 * 2**32), 2, 7, 5


@few
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize(("causal", "mask"), [(False, PLAIN), (True, PLAIN), (True, MASKED)])
def test_attention(shape: Any, causal: bool, mask: Any, numbers: Numbers, cuda: Any) -> None:
    batch, heads, queries, keys, depth = shape
    # Packed, as the projections are; rows of 16 bytes for some depths and types.
    qkv = [numbers.normal(batch, length, heads, depth, scale=s)
           for length, s in ((queries, 1.0), (keys, 1.1), (keys, 1.2), (queries, 1.3))]  # fmt: skip
    q, k, v, g = (tuple(x.transpose(0, 2, 1, 3) for x in pair) for pair in qkv)
    scale = depth**-0.5
    out, lse = (
        numbers.empty(batch, queries, heads, depth),
        numbers.empty(batch, heads, queries, sums=True),
    )
    out = tuple(x.transpose(0, 2, 1, 3) for x in out)
    how = (scale, scale), (causal, causal), *zip(mask, mask, strict=True)
    found, exact = zip(q, k, v, *how, out, lse, strict=True)
    cuda.attention(*found)
    generic.attention(*exact)
    numbers.close(*out, 4)
    numbers.close(*lse, 4)
    for more in (False, True):
        grads = [numbers.normal(*x[1].shape, scale=0.5) for x in (q, k, v)]
        rounded = numbers.pair(out[1])
        flags = (more, more)
        found, exact = zip(q, k, v, rounded, lse, g, *how, flags, *grads, strict=True)
        cuda.attention_backward(*found)
        generic.attention_backward(*exact)
        for pair in grads:
            numbers.close(*pair, 8)


def test_attention_without_tensor_cores(standing_in: Any, cuda: Any, monkeypatch: Any) -> None:
    """The products that lanes exchange numbers for, in place of those of the emulation."""
    monkeypatch.setattr(emulator, "FLAGS", (*emulator.FLAGS, "-DBY_SHUFFLES"))
    emulator.library.cache_clear()
    numbers = Numbers(standing_in, "float32")
    q, k, v = (numbers.normal(1, 1, n, 5) for n in (17, 18, 18))
    out, lse = numbers.empty(1, 1, 17, 5), numbers.empty(1, 1, 17, sums=True)
    how = (0.5, 0.5), (True, True), *zip(PLAIN, PLAIN, strict=True)
    found, exact = zip(q, k, v, *how, out, lse, strict=True)
    cuda.attention(*found)
    generic.attention(*exact)
    numbers.close(*out, 4)
    emulator.library.cache_clear()


@of_types("bfloat16")
@pytest.mark.parametrize("depth", [40, 80])
def test_attention_with_larger_heads(depth: int, numbers: Numbers, cuda: Any) -> None:
    test_attention((1, 1, 40, 33, depth), True, PLAIN, numbers, cuda)


def test_heads_that_are_too_large_take_the_long_way(numbers: Numbers, cuda: Any) -> None:
    from hpcml.kernels.cuda.attention import takes

    assert takes(64, numbers.dtype)
    assert takes(128, numbers.dtype) == (numbers.dtype.name != "float64")
    assert not takes(129, numbers.dtype)


def test_the_long_way_is_told_once(standing_in: Any, cuda: Any, caplog: Any) -> None:
    """With a number of heads' elements that no other test has."""
    numbers = Numbers(standing_in, "float32")
    q, k, v, g, *grads = (numbers.normal(1, 1, 3, 131, scale=1 + i / 8) for i in range(7))
    out, lse = numbers.empty(1, 1, 3, 131), numbers.empty(1, 1, 3, sums=True)
    how = (0.1, 0.1), (True, True), *zip(PLAIN, PLAIN, strict=True)
    for _ in range(2):
        found, exact = zip(q, k, v, *how, out, lse, strict=True)
        cuda.attention(*found)
        generic.attention(*exact)
        numbers.close(*out, 4)
        both = zip(q, k, v, out, lse, g, *how, (False, False), *grads, strict=True)
        cuda.attention_backward(*next(both))
    lines = [line for line in caplog.messages if "cuDNN" not in line]
    (line,) = lines
    assert line.startswith("attention by array expressions")
    assert line.endswith("heads of 131 in float32 are too large for tiles")


def test_heads_are_as_large_as_the_device_has_shared_memory_for(
    numbers: Numbers, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """99 KiB in all: tiles of exactly that leave nothing for what a kernel has beside them."""
    attention = importlib.import_module("hpcml.kernels.cuda.attention")
    monkeypatch.setattr(attention, "_most_shared", lambda device: 99 << 10)
    size = numbers.dtype.itemsize
    assert attention.takes(32 if size == 8 else 64, numbers.dtype)
    assert attention.takes(128, numbers.dtype) == (size == 2)
    assert attention.takes(64, numbers.dtype) == (size < 8)


@few
def test_attention_in_two_parts(numbers: Numbers, cuda: Any) -> None:
    out, other = numbers.normal(2, 3, 9, 5), numbers.normal(2, 3, 9, 5, scale=2)
    lse, total = (numbers.normal(2, 3, 9, sums=True, scale=s) for s in (1, 2))
    found, exact = zip(out, lse, other, total, strict=True)
    cuda.join_attention(*found)
    generic.join_attention(*exact)
    numbers.close(*out, 2)
    numbers.close(*lse, 2)
