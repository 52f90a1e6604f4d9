"""Flat storage: views, gaps, and what becomes of gradients from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.optim import SGD, AdamW, FlatStorage
from hpcml.optim.buckets import ALIGNMENT, Sharding

SHAPES = [(3, 5), (7,), (), (17, 3), (16,), (0, 4), (1,)]


def parameters(dtype: Any = np.float32) -> list[nn.Parameter]:
    random = np.random.default_rng(3)
    return [nn.Parameter(np.asarray(random.normal(size=shape), dtype)) for shape in SHAPES]


def slices(storage: FlatStorage) -> list[slice]:
    """Where each parameter lies in the arrays of all buckets, in the order of the storage."""
    found, start = [], 0
    for bucket in storage.buckets:
        found += [slice(start + part.start, start + part.stop) for part in bucket.slices]
        start += bucket.size
    return found


def gaps(storage: FlatStorage) -> np.ndarray:
    """Which elements of the buffers belong to no parameter."""
    outside = np.ones(storage.data.size, bool)
    for part in slices(storage):
        outside[part] = False
    return outside


def test_parameters_and_gradients_are_views() -> None:
    made = parameters()
    before = [p.numpy().copy() for p in made]
    storage = FlatStorage([made])
    for p, values, part in zip(made, before, slices(storage), strict=True):
        np.testing.assert_array_equal(p.numpy(), values)
        assert p.shape == values.shape
        storage.data[part] = 7
        assert (p.numpy() == 7).all()
        (p * 2.0).sum().backward()
        assert p.grad is not None and (p.grad.numpy() == 2).all()
        assert (storage.grad[part] == 2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_parameter_starts_on_a_cache_line_of_the_buffer(dtype: Any) -> None:
    storage = FlatStorage([parameters(dtype)], bucket_bytes=100)
    line = ALIGNMENT // storage.dtype.itemsize
    assert len(storage.buckets) > 1
    assert all(part.start % line == 0 for part in slices(storage))
    assert storage.data.size % line == 0


sizes_and_groups = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 2)), min_size=1,
                            max_size=8)  # fmt: skip


@given(sizes_and_groups, st.integers(1, 5), st.integers(0, 3), st.integers(1, 40_000))
def test_every_element_has_one_owner_whatever_the_layout(
    wanted: list[tuple[int, int]], ranks: int, stage: int, limit: int
) -> None:
    """Pieces of the optimizer cover each parameter once, in its group; norms add up."""
    total, counted, norm = sum(n for n, _ in wanted), 0, 0.0
    for rank in range(ranks):
        made = [nn.Parameter(np.full(n, i + 1.0)) for i, (n, _) in enumerate(wanted)]
        groups = [[p for p, (_, g) in zip(made, wanted, strict=True) if g == k] for k in range(3)]
        storage = FlatStorage(
            groups, units=[made[:3], made[3:]] if made[3:] else [made], bucket_bytes=limit,
            sharding=Sharding(stage, ranks, rank),
        )  # fmt: skip
        value_of = {id(p): i + 1.0 for i, p in enumerate(made)}
        group_of = {i + 1.0: g for i, (_, g) in enumerate(wanted)}
        for bucket in storage.buckets:
            assert bucket.size % (ranks * bucket.grain) == 0
            assert len(bucket.parameters) == 1 or bucket.content * 8 <= limit + 64 * 8
            for left, right in zip(bucket.slices, bucket.slices[1:], strict=False):
                assert left.stop <= right.start
        storage.grad[...] = 0
        for piece in storage.pieces:
            values = set(np.unique(piece.data)) - {0.0}
            assert {group_of[value] for value in values} <= {piece.group}
            piece.grad[...] = piece.data
            counted += int((piece.data != 0).sum())
            assert piece.state.stop - piece.state.start == piece.data.size
        norm += storage.squares().sum()
        assert set(value_of.values()) == set(group_of)
    copies = ranks if stage == 0 else 1
    assert counted == copies * total
    assert norm == pytest.approx(
        copies * sum(n * (i + 1.0) ** 2 for i, (n, _) in enumerate(wanted))
    )


def test_gaps_stay_zero() -> None:
    """Or sums over the buffers would not be sums over the parameters."""
    made = parameters()
    optimizer = AdamW(made, lr=0.1, weight_decay=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        for p in made:
            p.grad = Tensor(np.ones(p.shape, np.float32))
        optimizer.step()
    outside = gaps(optimizer.storage)
    assert outside.any()
    for array in (optimizer.storage.data, optimizer.storage.grad, *optimizer.state.values()):
        assert not array[outside].any()
        assert array[~outside].all()
    count = sum(p.numel() for p in made)
    assert optimizer.grad_norm() == pytest.approx(np.sqrt(count))


def test_weight_gradients_land_in_the_buffer() -> None:
    """Backward writes there, so nothing is copied before the reduction."""
    layer = nn.Linear(5, 3)
    optimizer = SGD(layer.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        layer(Tensor(np.ones((4, 5), np.float32))).sum().backward()
        for p in layer.parameters():
            assert p.grad is not None
            assert np.shares_memory(p.grad.numpy(), optimizer.storage.grad)
            assert (p.grad.numpy() == 4).all(), "overwritten, not added to the step before"


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(5, 3)
    layer.bias.requires_grad = False  # type: ignore[union-attr]
    before = layer.bias.numpy().copy()  # type: ignore[union-attr]
    optimizer = AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(Tensor(np.ones((4, 5), np.float32))).sum().backward()
    optimizer.step()
    assert optimizer.storage.parameters == [layer.weight]
    np.testing.assert_array_equal(layer.bias.numpy(), before)  # type: ignore[union-attr]


def test_what_gets_no_gradient_gets_zero_not_that_of_the_step_before() -> None:
    used, unused = nn.Parameter(np.ones(3)), nn.Parameter(np.ones(3))
    optimizer = SGD([used, unused], lr=1.0)
    ((used + unused) * 2.0).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(unused.numpy(), [-1, -1, -1])
    optimizer.zero_grad()
    (used * 2.0).sum().backward()
    assert optimizer.grad_norm() == pytest.approx(np.sqrt(12))
    optimizer.step()
    np.testing.assert_array_equal(unused.numpy(), [-1, -1, -1])
    np.testing.assert_array_equal(used.numpy(), [-3, -3, -3])
    assert unused.grad is not None and not unused.grad.numpy().any()


def test_gradients_that_were_there_before_are_kept() -> None:
    early, late = nn.Parameter(np.ones(3)), nn.Parameter(np.ones(2))
    (early * 5.0).sum().backward()
    storage = FlatStorage([[early, late]])
    (early * 2.0).sum().backward()
    storage.finish_gradients()
    np.testing.assert_array_equal(storage.grad[slices(storage)[0]], [7, 7, 7])
    np.testing.assert_array_equal(storage.grad[slices(storage)[1]], [0, 0])


def test_types_must_not_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"float32.*float64"):
        FlatStorage([[nn.Parameter(np.ones(1, np.float32)), nn.Parameter(np.ones(1))]])


def test_first_values_do_not_depend_on_flat_storage() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 7)).name_parts()

    hpcml.manual_seed(11)
    alone, flat = model(), model()
    FlatStorage([list(flat.parameters())])
    for (name, one), other in zip(alone.named_parameters(), flat.parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=name)


@pytest.mark.parametrize("leave", ["another type", "another array", "another optimizer"])
def test_a_parameter_that_left_is_noticed(leave: str) -> None:
    """Its buffer would be updated without effect."""
    layer = nn.Linear(2, 2).name_parts()
    optimizer = SGD(layer.parameters())
    optimizer.step()
    if leave == "another type":
        layer.double()
    elif leave == "another array":
        layer.weight.data = np.ones((2, 2), np.float32)
    else:
        SGD(layer.parameters()).step()
    with pytest.raises(RuntimeError, match="weight has left this optimizer"):
        optimizer.step()


def test_parameters_move_and_show_what_they_were() -> None:
    """An update goes where they lie by then; what they lay in before stays as it was."""
    made = parameters()
    optimizer = SGD([{"params": made[:2], "lr": 1.0}, {"params": made[2:], "lr": 2.0}])
    optimizer.place(bucket_bytes=100)
    storage = optimizer.storage
    first, before = storage.data, [p.numpy().copy() for p in made]
    view = made[0].data.T  # as an operation may keep it
    second = first.copy()
    storage.move(second)
    for p in made:
        (p * 1.0).sum().backward()
    optimizer.step()
    after = [p.numpy().copy() for p in made]
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        np.testing.assert_allclose(new, old - (1.0 if number < 2 else 2.0), rtol=1e-6)
    np.testing.assert_array_equal(view, before[0].T)
    storage.show(first)
    for p, values in zip(made, before, strict=True):
        np.testing.assert_array_equal(p.numpy(), values)
    with pytest.raises(RuntimeError, match="has left this optimizer"):
        optimizer.step()
    storage.show(storage.data)
    for p, values in zip(made, after, strict=True):
        np.testing.assert_array_equal(p.numpy(), values)
    optimizer.step()
