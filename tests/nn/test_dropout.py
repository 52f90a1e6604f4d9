"""Dropout: its rate, and masks that belong to samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpcml import nn, rng
from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from hpcml.nn.part import Part, blocks
from tests.autograd.support import Array, leaf, normal

P = 0.3


def packed(x: Tensor) -> Tensor:
    return F.packed_self_attention(x, 2, P, True, name="a")


def masked(x: Tensor) -> Tensor:
    h = x.unsqueeze(1)
    mask = np.zeros((x.shape[1], x.shape[1]), np.float32)
    return F.scaled_dot_product_attention(h, h, h, mask, P, name="m").squeeze(1)


def plain(x: Tensor) -> Tensor:
    h = x.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h, dropout_p=P, name="s")


def attended(x: Tensor) -> Tensor:
    module = nn.MultiheadAttention(12, 2, dropout=P, batch_first=True)
    for number, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, dtype=str(x.dtype), salt=number)
    return module(x, x, x, need_weights=False)[0]


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: F.dropout(x, P, name="d") * F.dropout(x, P, name="d"),
    "module": lambda x: nn.Dropout(P)(x),
    "attention": plain,
    "attention with a mask": masked,
    "packed attention": packed,
    "multi-head": attended,
}


def evaluate(use: Callable[[Tensor], Tensor], x: Array, seed: int, first: int) -> list[Array]:
    tensor = leaf(x)
    with rng.samples(seed, first):
        out = use(tensor)
    g = np.ones(out.shape)
    out.backward(g)
    assert tensor.gradient is not None
    return [out.numpy(), tensor.gradient]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rate_and_scale(dtype: str) -> None:
    x = leaf(np.ones((200, 500), dtype))
    with rng.samples(0, 0):
        out = F.dropout(x, P)
    kept = out.numpy() != 0
    assert abs(kept.mean() - (1 - P)) < 0.005
    np.testing.assert_allclose(out.numpy()[kept], 1 / (1 - P), rtol=1e-6)
    for axis in (0, 1):
        deviation = kept.mean(axis).std() / np.sqrt(P * (1 - P) / kept.shape[axis])
        assert 0.8 < deviation < 1.2  # as of independent elements
    out.sum().backward()
    np.testing.assert_array_equal(x.gradient, out.numpy())  # the same mask in backward


def test_off_and_extremes() -> None:
    x = leaf(normal(3, 4))
    assert F.dropout(x, 0.5, False) is x and F.dropout(x, 0.0) is x
    assert (F.dropout(x, 1.0).numpy() == 0).all()
    module = nn.Dropout(0.5).eval()
    assert module(x) is x
    assert F.dropout(leaf(np.empty((0, 3)))).shape == (0, 3)


@pytest.mark.parametrize("name", USES)
def test_masks_belong_to_samples(name: str) -> None:
    """Microbatches of one batch get the masks of the whole, whatever their sizes."""
    use, x = USES[name], normal(6, 5, 12)
    whole = evaluate(use, x, 1, 10)
    for cuts in ([0, 2, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]):
        parts = [evaluate(use, x[a:b], 1, 10 + a) for a, b in pairwise(cuts)]
        for i in range(2):
            joined = np.concatenate([p[i] for p in parts])
            np.testing.assert_allclose(joined, whole[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", USES)
def test_masks_depend_on_sample_seed_and_use(name: str) -> None:
    use, x = USES[name], np.repeat(normal(1, 5, 12), 3, 0)
    values = evaluate(use, x, 1, 0)[0]
    again = evaluate(use, x, 1, 0)[0]
    np.testing.assert_array_equal(values, again)
    assert not np.allclose(values[0], values[1])
    for seed, first in ((2, 0), (1, 1)):
        assert not np.allclose(values[0], evaluate(use, x, seed, first)[0][0])
    with rng.samples(1, 0):
        one, two = use(Tensor(x)).numpy(), use(Tensor(x)).numpy()
    np.testing.assert_array_equal(one, values)
    assert not np.allclose(one, two)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("shape", "dim"), [((3, 70, 65), 1), ((3, 70, 65), 2), ((2, 5000), 1)])
def test_a_part_has_the_mask_of_the_whole(shape: tuple[int, ...], dim: int, ranks: int) -> None:
    """What the ranks have in one block each, or in two as in a zigzag, forward and backward."""
    x = normal(*shape)
    whole = evaluate(lambda y: F.dropout(y, P), x, 1, 10)
    cut, halves = blocks(shape[dim], ranks), blocks(shape[dim], 2 * ranks)
    pairs = zip(halves[:ranks], halves[: ranks - 1 : -1], strict=True)
    for ranges in [*((one,) for one in cut), *pairs]:
        part = Part(shape, dim, ranges)
        found = evaluate(lambda y, part=part: F.dropout(y, P, part=part), x[part.index], 1, 10)
        for mine, theirs in zip(found, whole, strict=True):
            np.testing.assert_array_equal(mine, theirs[part.index])


def test_a_part_may_be_empty() -> None:
    for ranges in ((), ((2, 2),)):
        part = Part((2, 3, 4), 1, ranges)
        assert F.dropout(leaf(np.empty((2, 0, 4))), part=part).shape == (2, 0, 4)


def test_some_heads_have_the_masks_they_have_among_all() -> None:
    x, heads = normal(2, 9, 3, 4, 5), 4
    with rng.samples(1, 10):
        whole = F.packed_self_attention(Tensor(x.reshape(2, 9, -1)), heads, P, True).numpy()
    with rng.samples(1, 10):
        mine = Tensor(x[:, :, :, 1:3].reshape(2, 9, -1))
        part = F.packed_self_attention(mine, 2, P, True, first_head=1).numpy()
    np.testing.assert_allclose(part, whole[:, :, 5:15], 1e-12, 1e-14)


def test_names_tell_modules_apart() -> None:
    model: Any = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).name_parts()
    x = Tensor(np.ones((2, 50)))
    with rng.samples(0, 0):
        first, second = model[0](x).numpy(), model[1](x).numpy()
    assert not np.array_equal(first, second)
    with rng.samples(0, 0):  # the order of calls does not matter
        np.testing.assert_array_equal(model[1](x).numpy(), second)
        np.testing.assert_array_equal(model[0](x).numpy(), first)
