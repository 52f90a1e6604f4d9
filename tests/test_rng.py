"""Random numbers as functions of (seed, name, index): streams, statistics, masks."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from hpcml import rng


def test_a_key_depends_on_the_seed_and_every_name() -> None:
    keys = {rng.key(*parts) for parts in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2)]}
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)
    assert rng.key(3, "layer", 1) == rng.key(3, "layer", 1)


def test_keys_are_the_same_in_every_version() -> None:
    # Written down: saved runs are resumed, and compared, by later versions.
    assert rng.key(0, "weight") == 0x6DAAA46DE66F78E4
    assert list(rng.words(0, 0, 4)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_shape_is_filled_in_order(dtype: str) -> None:
    flat, cube = np.empty(24, dtype), np.empty((2, 3, 4), dtype)
    for fill in (rng.normal, rng.uniform):
        fill(7, 3, flat)
        fill(7, 3, cube)
        np.testing.assert_array_equal(cube.reshape(-1), flat)
        fill(7, 3 + 10, flat[10:])
        np.testing.assert_array_equal(cube.reshape(-1), flat)


def test_a_view_that_would_be_copied_is_refused() -> None:
    with pytest.raises(AssertionError, match="copy"):
        rng.normal(7, 0, np.empty((4, 4))[:, ::2])
    with pytest.raises(AssertionError, match="copy"):
        rng.uniform(7, 0, np.empty((4, 4)).T[:, :3])


@pytest.mark.parametrize("dtype", [np.float16, ">f4"])
def test_other_dtypes_are_served_by_the_specification(dtype: str) -> None:
    out, expected = np.empty(100, dtype), np.empty(100)
    rng.normal(7, 1, out)
    rng.normal(7, 1, expected)
    np.testing.assert_allclose(out.astype(float), expected, 1e-3)


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    n = 400_000
    x = np.empty(n)
    rng.normal(rng.key(1, "moments"), 0, x)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (x**power).mean() == pytest.approx(moment, abs=4 * math.sqrt(variance / n))
    assert np.mean(np.abs(x) > 3) == pytest.approx(0.0026998, abs=4 * math.sqrt(0.0027 / n))
    for lag in (1, 2, 3, 4, 1000):
        assert (x[lag:] * x[:-lag]).mean() == pytest.approx(0, abs=4 / math.sqrt(n - lag))


def test_uniform_numbers_fill_their_interval_evenly() -> None:
    x = np.empty(400_000)
    rng.uniform(rng.key(1, "evenness"), 0, x)
    counts, _ = np.histogram(x, 100, (0, 1))
    chi_square = ((counts - 4000.0) ** 2 / 4000).sum()
    assert abs(chi_square - 99) < 4 * math.sqrt(2 * 99)


def test_every_bit_of_a_word_is_fair() -> None:
    words = rng.words(rng.key(1, "bits"), 0, 100_000)
    ones = [int(((words >> np.uint32(bit)) & np.uint32(1)).sum()) for bit in range(32)]
    assert all(abs(count - 50_000) < 5 * math.sqrt(25_000) for count in ones)


@pytest.mark.parametrize("other", [(1, "layer.0.weight"), (2, "layer.1.weight"), (1, "l", 0)])
def test_streams_of_different_names_are_independent(other: tuple[int, ...]) -> None:
    x, y = np.empty(100_000), np.empty(100_000)
    rng.normal(rng.key(1, "layer.1.weight"), 0, x)
    rng.normal(rng.key(*other), 0, y)
    assert (x * y).mean() == pytest.approx(0, abs=4 / math.sqrt(x.size))
    assert not np.isin(x[:1000], y).any()


def test_a_name_draws_another_key_each_time_and_the_same_ones_again() -> None:
    with rng.samples(5, 40):
        first = [rng.draw("drop"), rng.draw("drop"), rng.draw("other")]
    with rng.samples(5, 40):
        assert [rng.draw("drop"), rng.draw("drop"), rng.draw("other")] == first
    assert len({key for key, _ in first}) == 3
    assert {number for _, number in first} == {40}
    with rng.samples(6, 44):
        assert rng.draw("drop")[0] != first[0][0]
    with rng.samples(5, 44):
        assert rng.draw("drop") == (first[0][0], 44)


def test_samples_nest_and_leave_what_was() -> None:
    rng.manual_seed(3)
    outside = rng.draw("a")
    with rng.samples(4, 10):
        inside = rng.draw("a")
        with pytest.raises(RuntimeError), rng.samples(5, 20):
            raise RuntimeError
        assert rng.seed() == 4
        assert rng.draw("a")[0] not in (inside[0], outside[0])
    assert rng.seed() == 3
    rng.manual_seed(3)
    assert rng.draw("a") == outside


def test_nameless_parameters_are_counted_from_the_seed() -> None:
    rng.manual_seed(0)
    names = [rng.anonymous(), rng.anonymous()]
    rng.manual_seed(1)
    assert [rng.anonymous(), rng.anonymous()] == names
    assert len(set(names)) == 2


def test_each_thread_has_its_own_state() -> None:
    rng.manual_seed(9)
    seen: list[int] = []

    def other() -> None:
        seen.append(rng.seed())
        rng.manual_seed(8)
        seen.append(rng.seed())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [0, 8]
    assert rng.seed() == 9
