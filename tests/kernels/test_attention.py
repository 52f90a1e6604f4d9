"""Attention against its specification and PyTorch; sizes about tiles; strides; dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.kernels import cpu, generic, of
from tests.kernels.support import DTYPES, Array, bits, close, randoms

# batch, heads, queries, keys, depth
CASES = [
    (0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (1, 1, 0, 3, 4), (1, 1, 1, 1, 1), (2, 1, 7, 7, 1),
    (1, 2, 63, 63, 7), (1, 1, 64, 64, 8), (2, 2, 65, 65, 16), (1, 1, 300, 300, 8),
    (1, 2, 5, 70, 8), (1, 2, 70, 5, 8), (1, 1, 130, 64, 3), (1, 1, 64, 130, 3), (1, 1, 1, 300, 8),
]  # fmt: skip
KEY = np.uint64(0xFEDCBA9876543210)
FIRST = np.uint64((1 << 33) + 5)  # past 32 bits: both halves of a sample's number count
NEVER = np.uint32(0), 0, 0, 0
SOMETIMES = np.uint32(0.3 * 2**32), 0, 0, 0
WITHIN = np.uint32(0.3 * 2**32), 3, 70, 5  # of more heads and of a longer sequence


@pytest.fixture(params=DTYPES, autouse=True)
def dtype(request: pytest.FixtureRequest) -> str:
    of(np.empty(0, request.param))
    return str(request.param)


def forward(
    module: Any, q: Array, k: Array, v: Array, causal: bool, drop: Any = NEVER
) -> tuple[Array, Array]:
    out, lse = np.full(q.shape, np.nan, q.dtype), np.full(q.shape[:3], np.nan, q.dtype)
    scale = q.dtype.type(q.shape[3] ** -0.5)
    module.attention(q, k, v, scale, causal, KEY, FIRST, *drop, out, lse)
    return out, lse


def backward(
    module: Any, q: Array, k: Array, v: Array, g: Array, causal: bool, drop: Any = NEVER
) -> list[Array]:
    out, lse = forward(module, q, k, v, causal, drop)
    gradients = [np.full(a.shape, np.nan, a.dtype) for a in (q, k, v)]
    scale = q.dtype.type(q.shape[3] ** -0.5)
    module.attention_backward(
        q, k, v, out, lse, g, scale, causal, KEY, FIRST, *drop, False, *gradients
    )
    return gradients


def inputs(dtype: str, case: tuple[int, ...]) -> list[Array]:
    """Return q, k, v and the gradient of the output."""
    batch, heads, queries, keys, depth = case
    q, k = (batch, heads, queries, depth), (batch, heads, keys, depth)
    return randoms(dtype, q, k, k, q)


@pytest.mark.parametrize("drop", [NEVER, SOMETIMES, WITHIN])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: tuple[int, ...], causal: bool, drop: Any, dtype: str) -> None:
    arrays = inputs(dtype, case)
    doubles = [a.astype(np.float64) for a in arrays]
    expected = forward(generic, *doubles[:3], causal, drop)
    for actual, wanted in zip(forward(cpu, *arrays[:3], causal, drop), expected, strict=True):
        close(actual, wanted, dtype)
    wanted_gradients = backward(generic, *doubles, causal, drop)
    for actual, wanted in zip(backward(cpu, *arrays, causal, drop), wanted_gradients, strict=True):
        assert np.isfinite(actual).all()  # every element is written
        close(actual, wanted, dtype, 5, scale=1.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [(2, 3, 65, 65, 16), (1, 2, 70, 5, 8), (1, 2, 5, 70, 8)])
def test_attention_against_pytorch(case: tuple[int, ...], causal: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(dtype, case)
    *leaves, g = (torch.from_numpy(a.astype(np.float64)) for a in arrays)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    expected.backward(g)
    close(forward(cpu, *arrays[:3], causal)[0], expected.detach(), dtype)
    for actual, leaf in zip(backward(cpu, *arrays, causal), leaves, strict=True):
        close(actual, leaf.grad, dtype, 5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_projections_need_no_copies(causal: bool, dtype: str) -> None:
    batch, time, heads, depth = 2, 70, 3, 8
    shape = (batch, time, 3, heads, depth)
    packed, g = randoms(dtype, shape, (batch, time, heads, depth))
    gradient, out = np.full(shape, np.nan, dtype), np.full(g.shape, np.nan, dtype)
    q, k, v = (packed[:, :, i].swapaxes(1, 2) for i in range(3))
    dq, dk, dv = (gradient[:, :, i].swapaxes(1, 2) for i in range(3))
    lse, scale = np.empty((batch, heads, time), dtype), packed.dtype.type(depth**-0.5)
    common = (scale, causal, KEY, FIRST, *NEVER)
    turned = out.swapaxes(1, 2)
    cpu.attention(q, k, v, *common, turned, lse)
    cpu.attention_backward(q, k, v, turned, lse, g.swapaxes(1, 2), *common, False, dq, dk, dv)
    copies = [np.ascontiguousarray(a) for a in (q, k, v, g.swapaxes(1, 2))]
    expected = [*forward(cpu, *copies[:3], causal), *backward(cpu, *copies, causal)]
    for actual, wanted in zip((turned, lse, dq, dk, dv), expected, strict=True):
        close(actual, wanted, dtype)


@pytest.mark.parametrize("module", [cpu, generic])
def test_dropout_is_the_same_forward_and_backward(module: Any, dtype: str) -> None:
    if dtype == "float32":
        pytest.skip("finite differences need float64")
    arrays = inputs(dtype, (2, 2, 70, 66, 4))
    gradients = backward(module, *arrays, True, SOMETIMES)
    directions = randoms(dtype, *(a.shape for a in arrays[:3]))
    step = 1e-5

    def loss(sign: float) -> float:
        moved = [a + sign * step * d for a, d in zip(arrays[:3], directions, strict=True)]
        return float((forward(module, *moved, True, SOMETIMES)[0] * arrays[3]).sum())

    numeric = (loss(1) - loss(-1)) / (2 * step)
    exact = sum(float((a * b).sum()) for a, b in zip(gradients, directions, strict=True))
    assert numeric == pytest.approx(exact, rel=1e-7)


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(dtype: str) -> None:
    q, k, v = (np.zeros((2, 3, 64, 64), dtype) for _ in range(3))
    v[...] = np.eye(64)  # the output is then the matrix of probabilities, 1/64 each before dropout
    out, _ = forward(cpu, q, k, v, False, SOMETIMES)
    assert np.mean(out == 0) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / out.size))
    kept = out[out != 0]
    close(kept, np.full(kept.size, 1 / 64 / (1 - SOMETIMES[0] / 2**32)), dtype)
    assert len({row.tobytes() for row in (out != 0).reshape(-1, 64)}) == 2 * 3 * 64


def test_a_sample_s_mask_depends_on_its_number_alone(dtype: str) -> None:
    arrays = inputs(dtype, (3, 2, 9, 9, 4))[:3]
    whole, _ = forward(cpu, *arrays, True, SOMETIMES)
    out, lse = np.empty_like(whole[1:]), np.empty_like(whole[1:, :, :, 0])
    later = np.uint64(FIRST + np.uint64(1))
    scale = whole.dtype.type(0.5)
    cpu.attention(*(a[1:] for a in arrays), scale, True, KEY, later, *SOMETIMES, out, lse)
    assert bits(out) == bits(whole[1:])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 66])
@pytest.mark.parametrize("module", [cpu, generic])
def test_a_block_has_the_mask_of_the_whole(module: Any, start: int, dtype: str) -> None:
    """Of some heads, queries and keys, the first key at any place within a block of four."""
    head, query, keys = 2, 3, 70
    zeros = np.zeros((2, 4, keys, keys), dtype)
    ones = np.broadcast_to(np.eye(keys, dtype=dtype), zeros.shape)
    whole, _ = forward(module, zeros, zeros, ones, False, SOMETIMES)
    q, k = zeros[:, head:, query:], zeros[:, head:, start:]
    v = ones[:, head:, start:].copy()
    part, _ = forward(module, q, k, v, False, (SOMETIMES[0], head, query, start))
    np.testing.assert_array_equal(
        part[..., start:] != 0, whole[:, head:, query:, start:] != 0, strict=True
    )


@pytest.mark.parametrize("keys", [1, 7, 69])
@pytest.mark.parametrize("module", [cpu, generic])
def test_attention_to_some_keys_and_to_the_others_is_that_to_all(
    module: Any, keys: int, dtype: str
) -> None:
    q, k, v, _ = inputs(dtype, (2, 3, 33, 70, 5))
    k[0, :, keys:] *= 30  # sums of which the exponential would overflow
    out, lse = forward(module, q, k[:, :, :keys], v[:, :, :keys], False)
    others = forward(module, q, k[:, :, keys:], v[:, :, keys:], False)
    packed = np.zeros((2, 33, 3, 5), dtype).swapaxes(1, 2)  # heads side by side
    packed[...] = out
    module.join_attention(packed, lse, *others)
    for actual, wanted in zip((packed, lse), forward(module, q, k, v, False), strict=True):
        close(actual, wanted, dtype)


@pytest.mark.parametrize("module", [cpu, generic])
def test_gradients_of_blocks_of_keys_add_up(module: Any, dtype: str) -> None:
    """With the output and the sums of all keys; causal where a block is that of the queries."""
    q, k, v, g = inputs(dtype, (2, 3, 80, 80, 8))
    expected = backward(module, q, k, v, g, True, SOMETIMES)
    out, lse = forward(module, q, k, v, True, SOMETIMES)
    found = [np.ones_like(a) for a in (q, k, v)]
    for first, last in ((0, 13), (13, 80)):
        for start, end in ((0, 13), (13, 80)):
            if start > first:
                continue
            rows, keys = np.s_[:, :, first:last], np.s_[:, :, start:end]
            module.attention_backward(
                q[rows], k[keys], v[keys], out[rows], lse[rows], g[rows], q.dtype.type(8**-0.5),
                first == start, KEY, FIRST, SOMETIMES[0], 0, first, start, True,
                found[0][rows], found[1][keys], found[2][keys],
            )  # fmt: skip
    for actual, wanted in zip(found, expected, strict=True):
        close(actual - 1, wanted, dtype, 5)


def test_large_scores_are_finite_and_pick_the_largest(dtype: str) -> None:
    q, k = np.array([[[[1e4]]]], dtype), np.array([[[[1], [-1], [0.5]]]], dtype)
    v = np.array([[[[1], [2], [3]]]], dtype)
    out, lse = forward(cpu, q, k, v, False)
    assert out.item() == 1
    assert lse.item() == 1e4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad: float, dtype: str) -> None:
    q, k, v, g = inputs(dtype, (1, 1, 70, 70, 8))
    q[0, 0, 66, 3] = bad
    out, lse = forward(cpu, q, k, v, True)
    assert not np.isfinite(out[0, 0, 66]).any()
    assert not np.isfinite(lse[0, 0, 66])
    assert np.isfinite(np.delete(out, 66, axis=2)).all()
    assert not np.isfinite(backward(cpu, q, k, v, g, True)[1]).all()
