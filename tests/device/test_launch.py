"""Launches that CUDA would refuse: grids, blocks and shared memory beyond its limits."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcml.kernels.cuda.attention import takes
from tests.device import emulator
from tests.device.support import DTYPES, Numbers, of_types
from tests.device.test_attention import PLAIN

MANY = 65_537
"""More than a grid has blocks along y and z."""


@pytest.fixture
def launched(standing_in: Any) -> list[str]:
    """The names of kernels whose launch is checked, but which are neither compiled nor run."""
    names: list[str] = []

    class Kernel(emulator.Limits):
        def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
            self.check(grid, block, shared_mem)
            names.append(self.name)

    standing_in.RawModule = lambda **_: SimpleNamespace(get_function=Kernel)
    return names


def attend(device: Any, name: str, *shape: int) -> None:
    """Attention of this shape (B, H, T, D) forward, backward and joined, by our own kernels."""
    from hpcml.kernels import cuda

    numbers = Numbers(device, name)
    q, out, *grads = (numbers.empty(*shape)[0] for _ in range(5))
    lse = numbers.empty(*shape[:3], sums=True)[0]
    cuda.attention(q, q, q, 1.0, True, *PLAIN, out, lse)
    cuda.attention_backward(q, q, q, out, lse, q, 1.0, True, *PLAIN, False, *grads)
    cuda.join_attention(out, lse, q, lse)


@pytest.mark.parametrize("shape", [(MANY // 3 + 1, 3, 1, 1), (1, 1, 4 * MANY, 1)])
def test_attention_of_many_heads_and_of_many_positions(
    shape: Any, standing_in: Any, launched: list[str]
) -> None:
    attend(standing_in, "bfloat16", *shape)
    names = "attention", "attention_delta", "attention_queries", "attention_keys", "join_attention"
    assert launched == [*names]


def test_dropout_of_many_samples(standing_in: Any, launched: list[str]) -> None:
    from hpcml.kernels import cuda

    x, runs = standing_in.empty((MANY, 1), np.float16), np.array([(0, 1)], np.int64)
    cuda.dropout(x, np.uint64(1), np.uint64(2), np.uint32(3), runs, 1, x)
    assert launched == ["dropout"]


@pytest.mark.parametrize("shape", [(MANY, 1, 1), (1, 32 * MANY, 1), (1, 1, 32 * MANY)])
def test_transposing_many_matrices_and_long_ones(
    shape: Any, standing_in: Any, launched: list[str]
) -> None:
    from hpcml.kernels.cuda import images

    x = standing_in.empty(shape, np.float16)
    images.transpose(x, standing_in.empty((shape[0], shape[2], shape[1]), np.float16))
    assert launched == ["transpose"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_asks_for_shared_memory(
    dtype: str, standing_in: Any, launched: list[str]
) -> None:
    """As heads of each size and type need it."""
    for depth in (32, 64, 128):
        if takes(depth, Numbers(standing_in, dtype).dtype):
            attend(standing_in, dtype, 1, 1, 1, depth)
    assert len(launched) >= 10


def test_nothing_is_launched_for_no_columns(standing_in: Any, launched: list[str]) -> None:
    from hpcml.kernels import cuda

    nothing, index = standing_in.empty((5, 0), np.float32), standing_in.zeros(5, np.int64)
    cuda.embedding_backward(nothing, index, standing_in.empty((3, 0), np.float32))
    assert not launched


@pytest.mark.parametrize(
    ("grid", "block", "shared", "why"),
    [
        ((1 << 31,), (32,), 0, "grid"), ((1, 65536), (32,), 0, "grid"),
        ((1, 1, 65536), (32,), 0, "grid"), ((0,), (32,), 0, "grid"), ((1,), (0,), 0, "block"),
        ((1,), (1025,), 0, "block"), ((1,), (1, 1, 65), 0, "block"),
        ((1,), (32, 33), 0, "too large"),
        ((1,), (32,), (48 << 10) + 1, "49153 bytes of shared memory, but 49152"),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_what_cuda_does(grid: Any, block: Any, shared: int, why: str) -> None:
    kernel = emulator.Limits("a kernel")
    kernel.check(((1 << 31) - 1, 65535, 65535), (1024,), 48 << 10)
    with pytest.raises(AssertionError, match=why):
        kernel.check(grid, block, shared)


def test_no_kernel_asks_for_more_shared_memory_than_there_is() -> None:
    kernel = emulator.Limits("a kernel")
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    kernel.check((1,), (32,), 227 << 10)
    with pytest.raises(AssertionError, match="no device has"):
        kernel.max_dynamic_shared_size_bytes = (227 << 10) + 1


def test_the_stand_in_keeps_what_a_function_reads(standing_in: Any) -> None:
    """An array that nobody else has was freed before, and another thread wrote there."""
    freed, seen = [], []

    def made() -> Any:
        array = standing_in.ones(3)
        weakref.finalize(array, freed.append, "array")
        return array

    class Number:
        def __array__(self, *_: Any, **__: Any) -> Any:
            seen.append(bool(freed))
            return np.zeros(3)

    standing_in.add(made(), Number())
    assert seen == [False] and freed


def test_on_a_gpu_kernels_are_tried_with_all_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCML_GPU", "1")
    assert of_types("float32").args == ("numbers", DTYPES)
    monkeypatch.delenv("HPCML_GPU")
    assert of_types("float32").args == ("numbers", ("float32",))
