"""Kernels over rows: layer norm, softmax cross-entropy, gradient of an embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.kernels import cpu, generic, of
from tests.kernels.support import DTYPES, Array, bits, close, randoms

SHAPES = [(0, 5), (1, 1), (3, 1), (1, 300), (5, 7), (9, 63), (64, 64), (65, 65), (4, 1000)]
IGNORE = -100


@pytest.fixture(params=DTYPES, autouse=True)
def dtype(request: pytest.FixtureRequest) -> str:
    of(np.empty(0, request.param))
    return str(request.param)


def normed(module: Any, x: Array, weight: Array, bias: Array) -> tuple[Array, Array, Array]:
    out, mean, inverse = np.empty_like(x), np.empty_like(x[:, 0]), np.empty_like(x[:, 0])
    module.layer_norm(x, weight, bias, x.dtype.type(1e-5), out, mean, inverse)
    return out, mean, inverse


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weighted", "biased"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_layer_norm(shape: tuple[int, int], weighted: int, biased: int, dtype: str) -> None:
    n = shape[1]
    x, weight, bias = randoms(dtype, shape, (n * weighted,), (n * biased,))
    x = x * 3 + 2
    doubles = [a.astype(np.float64) for a in (x, weight, bias)]
    for actual, expected in zip(
        normed(cpu, x, weight, bias), normed(generic, *doubles), strict=True
    ):
        close(actual, expected, dtype, 3)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("weighted", "pending"), [(1, 0), (0, 1)])
def test_layer_norm_backward(
    shape: tuple[int, int], weighted: int, pending: int, dtype: str
) -> None:
    rows, n = shape
    x, g, weight, base = randoms(dtype, shape, shape, (n * weighted,), (rows * pending, n))
    _, mean, inverse = normed(generic, x.astype(np.float64), np.empty(0), np.empty(0))
    kept = [mean.astype(dtype), inverse.astype(dtype)]
    out, expected = np.empty_like(x), np.empty(shape)
    cpu.layer_norm_backward(g, x, weight, *kept, base, out)
    wide = [a.astype(np.float64) for a in (g, x, weight, *kept, base)]
    generic.layer_norm_backward(*wide, expected)
    close(out, expected, dtype, 5 if n > 1 else 1e3)  # one column: all cancels, times 1 / sqrt(eps)
    sums, wanted = np.empty(n, dtype), np.empty(n)
    cpu.layer_norm_weight_gradient(g, x, *kept, sums)
    generic.layer_norm_weight_gradient(*wide[:2], *wide[3:5], wanted)
    close(sums, wanted, dtype, 3)


def test_layer_norm_against_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x, g, weight, bias = randoms(dtype, (65, 63), (65, 63), (63,), (63,))
    leaves = [torch.from_numpy(a).double().requires_grad_() for a in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(leaves[0], (63,), leaves[1], leaves[2])
    expected.backward(torch.from_numpy(g).double())
    out, mean, inverse = normed(cpu, x, weight, bias)
    close(out, expected.detach(), dtype, 3)
    gradient, of_weight = np.empty_like(x), np.empty_like(weight)
    cpu.layer_norm_backward(g, x, weight, mean, inverse, np.empty((0, 63), dtype), gradient)
    cpu.layer_norm_weight_gradient(g, x, mean, inverse, of_weight)
    close(gradient, leaves[0].grad, dtype, 3)
    close(of_weight, leaves[1].grad, dtype, 3)


def test_layer_norm_far_from_zero_does_not_cancel(dtype: str) -> None:
    (x,) = randoms(dtype, (4, 300))
    shift = x.dtype.type(2**10)
    (out, _, _), (expected, _, _) = (
        normed(cpu, x + shift, x[0, :0], x[0, :0]),
        normed(generic, (x + shift).astype(np.float64), np.empty(0), np.empty(0)),
    )
    close(out, expected, dtype, 1e2)


def test_layer_norm_shows_what_is_not_finite_in_its_row_only(dtype: str) -> None:
    (x,) = randoms(dtype, (4, 65))
    x[1, 64], x[2, 3] = np.nan, np.inf
    out, _, _ = normed(cpu, x, x[0, :0], x[0, :0])
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[2]).all()
    assert np.isfinite(out[[0, 3]]).all()


def losses(module: Any, logits: Array, target: Array) -> tuple[Array, Array, Array]:
    """Return the losses, their lse and the gradient of the sum of (row number + 1) * loss."""
    loss, lse = np.empty_like(logits[:, 0]), np.empty_like(logits[:, 0])
    module.cross_entropy(logits, target, IGNORE, loss, lse)
    g, out = np.arange(1, len(target) + 1).astype(logits.dtype), np.full_like(logits, np.nan)
    module.cross_entropy_backward(logits, target, IGNORE, lse, g, out)
    return loss, lse, out


def targets(rows: int, classes: int) -> Array:
    target = np.arange(rows) * 7 % classes
    target[::4] = IGNORE
    return target


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape: tuple[int, int], dtype: str) -> None:
    (logits,) = randoms(dtype, shape)
    logits *= 5
    target = targets(*shape)
    expected = losses(generic, logits.astype(np.float64), target)
    for actual, wanted in zip(losses(cpu, logits, target), expected, strict=True):
        close(actual, wanted, dtype, 2)


def test_cross_entropy_against_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    (logits,) = randoms(dtype, (65, 63))
    target = targets(65, 63)
    leaf = torch.from_numpy(logits).double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, torch.from_numpy(target), reduction="none")
    expected.backward(torch.arange(1, 66).double())
    loss, _, gradient = losses(cpu, logits, target)
    close(loss, expected.detach(), dtype)
    close(gradient, leaf.grad, dtype)


def test_cross_entropy_of_large_logits_is_finite_and_right(dtype: str) -> None:
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [1e4, 1e4, -1e4], [-1e4] * 3], dtype)
    loss, _, gradient = losses(cpu, logits, np.array([0, 1, 0, 2]))
    close(loss, [0, 2e4, np.log(2), np.log(3)], dtype, 1e-3)
    close(gradient, [[0] * 3, [2, -2, 0], [-1.5, 1.5, 0], [4 / 3, 4 / 3, -8 / 3]], dtype, 500)


def test_a_small_loss_of_large_logits_survives_rounding(dtype: str) -> None:
    logits = np.array([[1e4, 1e4 - 8]], dtype)
    loss, _, _ = losses(cpu, logits, np.array([0]))
    assert loss[0] == pytest.approx(np.log1p(np.exp(-8.0)), rel=1e-3)
    loss, _, _ = losses(generic, logits, np.array([0]))
    assert loss[0] == pytest.approx(np.log1p(np.exp(-8.0)), rel=1e-3)


@pytest.mark.parametrize("column", [0, 1, 31, 64])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_loss_of_logits_that_are_not_finite_is_not_finite(
    bad: float, column: int, dtype: str
) -> None:
    (logits,) = randoms(dtype, (3, 65))
    logits[1, column] = bad
    loss, lse, gradient = losses(cpu, logits, np.array([2, 2, 2]))
    assert not np.isfinite(loss[1])
    assert not np.isfinite(lse[1])
    assert not np.isfinite(gradient[1]).all()
    assert np.isfinite(loss[[0, 2]]).all() and np.isfinite(gradient[[0, 2]]).all()


def test_a_masked_logit_has_no_probability(dtype: str) -> None:
    logits = np.array([[1, -np.inf, 2]], dtype)
    loss, _, gradient = losses(cpu, logits, np.array([0]))
    close(loss, [np.log1p(np.e)], dtype)
    assert gradient[0, 1] == 0


@pytest.mark.parametrize(("rows", "n"), [(0, 3), (1, 1), (50, 1), (300, 65)])
def test_embedding_backward_adds_row_after_row(rows: int, n: int, dtype: str) -> None:
    g, table = randoms(dtype, (rows, n), (11, n))
    index = np.arange(rows) * 5 % 9  # two rows of the table are never used
    expected = table.copy()
    cpu.embedding_backward(g, index, table)
    generic.embedding_backward(g, index, expected)
    assert bits(table) == bits(expected)


@pytest.mark.parametrize("part", [slice(1, 2), slice(3, 9), slice(2, 2)])
def test_a_row_has_the_same_bits_whatever_rows_are_computed_with_it(
    part: slice, dtype: str
) -> None:
    x, weight, bias = randoms(dtype, (9, 65), (65,), (65,))
    assert bits(*normed(cpu, x[part], weight, bias)) == bits(
        *(a[part] for a in normed(cpu, x, weight, bias))
    )
    _, mean, inverse = normed(cpu, x, weight, bias)
    whole, some, none = np.empty_like(x), np.empty_like(x), x[:0]
    cpu.layer_norm_backward(x, x, weight, mean, inverse, none, whole)
    cpu.layer_norm_backward(x[part], x[part], weight, mean[part], inverse[part], none, some[part])
    assert bits(some[part]) == bits(whole[part])
    target = np.full(9, 2)
    loss, lse, _ = losses(cpu, x, target)
    some_loss, some_lse, _ = losses(cpu, x[part], target[part])
    assert bits(some_loss, some_lse) == bits(loss[part], lse[part])
