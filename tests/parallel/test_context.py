"""Ring attention: values, gradients and masks of attention on one rank, and what it sends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml import Tensor, memory, rng
from hpcml.autograd import no_grad
from hpcml.comm import Axis, Mesh, run
from hpcml.comm.faults import Reorder, Synchronous
from hpcml.kernels import cpu
from hpcml.nn import functional as F
from hpcml.parallel.context import ring_attention, zigzag
from tests.ranks import OnRanks, on_ranks_of

Array = np.ndarray[Any, Any]
cases = pytest.mark.parametrize

BATCH, HEADS, DEPTH = 2, 3, 4
WIDTH = HEADS * DEPTH
LENGTHS = [1, 2, 5, 8, 13, 130]  # with and without ranks that have nothing, below and above a tile
RANKS = [1, 2, 3, 4]


def axis_of_all() -> Axis:
    return Mesh({"cp": Mesh().size})["cp"]


on_ranks = on_ranks_of(axis_of_all, RANKS)


def positions(length: int, axis: Axis) -> list[int]:
    return [i for first, end in zigzag(length, axis.size)[axis.rank] for i in range(first, end)]


def normal(*shape: int, salt: int = 0) -> Array:
    return np.random.default_rng([*shape, salt]).standard_normal(shape)


def attended(function: Callable[[Tensor], Tensor], qkv: Array, g: Array) -> tuple[Array, Array]:
    """Output and gradient, with the masks of the samples from 10 on."""
    x = Tensor(np.ascontiguousarray(qkv), True)
    with rng.samples(1, 10):
        out = function(x)
    out.backward(np.ascontiguousarray(g))
    assert x.grad is not None
    return out.numpy(), x.grad.numpy()


@cases("length", LENGTHS)
@cases("p", [0.0, 0.3])
@cases("causal", [True, False])
def test_as_on_one_rank(on_ranks: OnRanks, causal: bool, p: float, length: int) -> None:
    def program(axis: Axis) -> None:
        qkv, g = normal(BATCH, length, 3 * WIDTH), normal(BATCH, length, WIDTH, salt=1)
        whole = attended(lambda x: F.packed_self_attention(x, HEADS, p, causal), qkv, g)
        at = positions(length, axis)
        mine = attended(
            lambda x: ring_attention(x, HEADS, axis, length, dropout_p=p, is_causal=causal),
            qkv[:, at], g[:, at],
        )  # fmt: skip
        for found, expected in zip(mine, whole, strict=True):
            np.testing.assert_allclose(found, expected[:, at], 1e-12, 1e-12)

    on_ranks(program)


def test_some_heads_of_more(on_ranks: OnRanks) -> None:
    """A rank of tensor parallelism has some heads, with the masks that they have among all."""

    def program(axis: Axis) -> None:
        length, first, p = 11, 1, 0.4
        x, g = normal(BATCH, length, 3, HEADS, DEPTH), normal(BATCH, length, HEADS, DEPTH)
        flat = (BATCH, length, -1)
        whole = attended(
            lambda y: F.packed_self_attention(y, HEADS, p, True), x.reshape(flat), g.reshape(flat)
        )
        at = positions(length, axis)
        some = x[..., first:, :].reshape(flat)[:, at], g[..., first:, :].reshape(flat)[:, at]
        out, gradient = attended(
            lambda y: ring_attention(y, HEADS - first, axis, length, dropout_p=p, first_head=first),
            *some,
        )
        expected = whole[1].reshape(x.shape)[..., first:, :].reshape(flat)
        np.testing.assert_allclose(out, whole[0][:, at, first * DEPTH :], 1e-12, 1e-12)
        np.testing.assert_allclose(gradient, expected[:, at], 1e-12, 1e-12)

    on_ranks(program)


def total(axis: Axis, x: Array, y: Array) -> float:
    """The inner product of arrays that the ranks divide."""
    return float(axis.allreduce(np.array([np.vdot(x, y)]))[0])


@cases("causal", [True, False])
def test_adjoint(on_ranks: OnRanks, causal: bool) -> None:
    """Attention is linear in the values: <F v, g> = <v, F* g>. In all of qkv: by differences."""

    def program(axis: Axis) -> None:
        length, step = 9, 1e-6
        at = positions(length, axis)
        qkv, d = (normal(BATCH, length, 3 * WIDTH, salt=i)[:, at] for i in (0, 1))
        g = normal(BATCH, length, WIDTH)[:, at]

        def attention(x: Tensor) -> Tensor:
            return ring_attention(x, HEADS, axis, length, dropout_p=0.2, is_causal=causal)

        def moved(by: float) -> Array:
            with rng.samples(1, 10), no_grad():
                return attention(Tensor(qkv + by * d)).numpy()

        out, gradient = attended(attention, qkv, g)
        v, dv = qkv[..., 2 * WIDTH :], gradient[..., 2 * WIDTH :]
        assert total(axis, out, g) == pytest.approx(total(axis, v, dv), rel=1e-12)
        slope = total(axis, (moved(step) - moved(-step)) / (2 * step), g)
        assert slope == pytest.approx(total(axis, d, gradient), rel=1e-7)

    on_ranks(program)


@cases("dtype", ["float32", "bfloat16"])
def test_other_types(on_ranks: OnRanks, dtype: str) -> None:
    def program(axis: Axis) -> None:
        length, at = 21, positions(21, axis)
        qkv = Tensor(normal(BATCH, length, 3 * WIDTH)).to(dtype).data
        g = Tensor(normal(BATCH, length, WIDTH)).to(dtype).data
        whole = attended(lambda x: F.packed_self_attention(x, HEADS, 0.0, True), qkv, g)
        mine = attended(lambda x: ring_attention(x, HEADS, axis, length), qkv[:, at], g[:, at])
        for found, expected in zip(mine, whole, strict=True):
            assert found.dtype == expected.dtype
            limit = 1e-5 if dtype == "float32" else 2e-2
            found, expected = found.astype(np.float64), expected[:, at].astype(np.float64)
            np.testing.assert_allclose(found, expected, limit, limit)

    on_ranks(program)


@cases("length", [3, 16, 21])
@cases("causal", [True, False])
def test_bytes_sent(on_ranks: OnRanks, causal: bool, length: int) -> None:
    """Forward the keys and values of others that are still of use; backward gradients besides."""

    def program(axis: Axis) -> None:
        at = positions(length, axis)
        x = Tensor(normal(BATCH, len(at), 3 * WIDTH), True)
        start = axis.ledger.snapshot()
        out = ring_attention(x, HEADS, axis, length, is_causal=causal)
        middle = axis.ledger.snapshot()
        out.backward(np.ones(out.shape))
        end = axis.ledger.snapshot()
        if axis.size == 1:
            assert not end - start
            return
        a_position = 2 * BATCH * WIDTH * 8  # a key and a value, in float64
        last = (axis.rank - 1) % axis.size  # the rank before, which is sent to
        sent = 0
        for rank, (first, second) in enumerate(zigzag(length, axis.size)):
            if rank != last:
                sent += first[1] - first[0]
                if rank > last or not causal:
                    sent += second[1] - second[0]
        others = axis.size - 1
        forward, backward = (middle - start)["cp"], (end - middle)["cp"]
        assert forward.keys() == backward.keys() == {"send"}
        assert forward["send"].bytes_sent == a_position * sent
        assert backward["send"].bytes_sent == a_position * (sent + length)
        assert (forward["send"].calls, backward["send"].calls) == (others, others + axis.size)

    on_ranks(program)


@cases("causal", [True, False])
@cases("ranks", RANKS)
def test_every_rank_computes_as_much(
    ranks: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that are computed: what is seen, once, and alike on all ranks."""
    length, kernel = 96, cpu.attention
    scores: dict[str, int] = {}

    def counted(q: Array, k: Array, v: Array, scale: Any, causal: bool, *rest: Any) -> None:
        queries, keys = q.shape[2], k.shape[2]
        name = threading.current_thread().name
        done = queries * (queries + 1) // 2 if causal else queries * keys
        scores[name] = scores.get(name, 0) + done
        kernel(q, k, v, scale, causal, *rest)

    def program() -> None:
        axis = axis_of_all()
        x = normal(1, len(positions(length, axis)), 3 * WIDTH)
        ring_attention(Tensor(x), HEADS, axis, length, is_causal=causal)

    cpu.load("float64")
    monkeypatch.setattr(cpu, "attention", counted)
    run(program, ranks=ranks)
    seen = length * (length + 1) // 2 if causal else length * length
    assert sum(scores.values()) == seen
    assert set(scores.values()) == {seen // ranks}


def peak(length: int) -> tuple[int, int]:
    """Most bytes in all, and of buffers, that forward and backward of a rank need."""
    axis, account = axis_of_all(), memory.account()
    own = len(positions(length, axis))
    x = Tensor(memory.zeros((1, own, 3 * WIDTH), np.float64), True)
    account.reset_peak()
    out = ring_attention(x, HEADS, axis, length)
    out.backward(memory.zeros(out.shape, np.float64))
    return account.peak_total, account.peak["buffers"]


def test_memory_falls_as_the_ranks_grow() -> None:
    length = 480
    sizes = {ranks: max(run(peak, length, ranks=ranks)) for ranks in (1, 2, 4, 8)}
    a_position = WIDTH * 8
    held = 3 + 3 + 1 + 1  # qkv, out, and their gradients; all else is small
    travelling = 2 * (2 + 3)  # keys and values twice, their gradients three times
    for ranks, (most, buffers) in sizes.items():
        besides = travelling if ranks > 1 else 0
        assert buffers * ranks == besides * length * a_position
        assert most * ranks == pytest.approx((held + besides) * length * a_position, rel=0.05)


@cases("fault", [Synchronous(), Reorder()])
def test_no_rank_relies_on_buffers_or_on_luck(fault: Any) -> None:
    def program() -> Array:
        axis, length = axis_of_all(), 10
        at = positions(length, axis)
        x = normal(BATCH, length, 3 * WIDTH)[:, at]
        return attended(lambda y: ring_attention(y, HEADS, axis, length), x, x[..., :WIDTH])[1]

    for found, expected in zip(
        run(program, ranks=4, faults=[fault]), run(program, ranks=4), strict=True
    ):
        assert found.tobytes() == expected.tobytes()


def test_the_zigzag() -> None:
    assert zigzag(16, 4) == [
        ((0, 2), (14, 16)),
        ((2, 4), (12, 14)),
        ((4, 6), (10, 12)),
        ((6, 8), (8, 10)),
    ]
    assert zigzag(5, 1) == [((0, 3), (3, 5))]
    assert zigzag(1, 3) == [((0, 1), (1, 1)), ((1, 1), (1, 1)), ((1, 1), (1, 1))]


def test_a_wrong_shape_is_one_line(on_ranks: OnRanks) -> None:
    def program(axis: Axis) -> None:
        own = len(positions(7, axis))
        for shape, heads in (((2, own + 1, 12), 2), ((2, own, 13), 2), ((own, 12), 2)):
            with pytest.raises(ValueError, match=rf"rank {axis.rank} of cp.* has {own} of 7 pos"):
                ring_attention(Tensor(np.ones(shape)), heads, axis, 7)

    on_ranks(program)
