"""The order of samples: permutations that can be evaluated at any point, by any rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml.data import Sampler

SIZES = [1, 2, 3, 5, 7, 97, 101] + [2**k + d for k in (2, 3, 8, 11) for d in (-1, 0, 1)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63])
def test_every_epoch_visits_each_sample_once(n: int, seed: int) -> None:
    sampler = Sampler(n, seed)
    for epoch in (0, 1, 1000):
        indices = sampler.indices(epoch * n, (epoch + 1) * n)
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(np.sort(indices), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**64), data=st.data())
def test_any_slice_gives_the_same_order(n: int, seed: int, data: st.DataObject) -> None:
    """Ranks and microbatches cut the order differently; epochs may end within a slice."""
    stop = data.draw(st.integers(0, 3 * n))
    cuts = sorted(data.draw(st.lists(st.integers(0, stop), max_size=5)))
    edges = [0, *cuts, stop]
    sampler = Sampler(n, seed)
    parts = [sampler.indices(a, b) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), sampler.indices(0, stop))


def test_epochs_and_seeds_differ() -> None:
    orders = [Sampler(100, seed).indices(e * 100, e * 100 + 100) for seed in (1, 2) for e in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


@pytest.mark.parametrize("n", [2, 5, 12, 33])
def test_places_and_neighbours_are_uniform(n: int) -> None:
    """Over many epochs every index is as likely at each place, and after each other index."""
    epochs = 4000
    orders = Sampler(n, 3).indices(0, epochs * n).reshape(epochs, n)
    first = np.bincount(orders[:, 0], minlength=n)
    last = np.bincount(orders[:, -1], minlength=n)
    step = np.bincount((orders[:, 1] - orders[:, 0]) % n, minlength=n)[1:]
    for counts in (first, last, step):
        expected = epochs / len(counts)
        chi_squared = ((counts - expected) ** 2).sum() / expected
        degrees = len(counts) - 1
        assert chi_squared < degrees + 5 * np.sqrt(2 * degrees) + 1


def test_large_data_sets_cost_nothing_to_enter_anywhere() -> None:
    n = 10**12 + 7
    indices = Sampler(n, 0).indices(5 * n - 1000, 5 * n + 1000)
    assert ((indices >= 0) & (indices < n)).all()
    assert len(np.unique(indices)) == 2000
    assert indices.std() == pytest.approx(n / np.sqrt(12), rel=0.1)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="n=0"):
        Sampler(0, 1)
