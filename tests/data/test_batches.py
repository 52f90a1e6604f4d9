"""Batches load what is asked for; whatever a data factory makes becomes `Data`."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from hpcml.data import Batch, Batches, Data, as_data
from hpcml.data.regression import regression
from hpcml.errors import UserError


class Squares:
    """A data set as PyTorch's users write it; remembers what was loaded."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, float]:
        self.loaded.append(index)
        return np.full(3, index, np.float32), index**2


class Fast(Squares):
    """The same with the fast path."""

    def fetch(self, indices: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        """Return stacked samples."""
        return np.repeat(indices[:, None].astype(np.float32), 3, 1), indices**2


def test_a_slice_of_a_batch_loads_these_samples_only() -> None:
    dataset = Squares(10)
    batch = Batch(dataset, np.array([7, 1, 4, 2]), first=40)
    assert (len(batch), batch.first, dataset.loaded) == (4, 40, [])
    x, y = batch[1:3]
    assert dataset.loaded == [1, 4]
    np.testing.assert_array_equal(x, [[1, 1, 1], [4, 4, 4]])
    np.testing.assert_array_equal(y, [1, 16])
    assert x.dtype == np.float32
    with pytest.raises(TypeError, match="slice"):
        batch[0]  # type: ignore[index]


def test_fetch_gives_what_stacking_gives() -> None:
    for slow, fast in zip(
        islice(Batches(Squares(10), 4, seed=1), 5),
        islice(Batches(Fast(10), 4, seed=1), 5),
        strict=True,
    ):
        for a, b in zip(slow[:], fast[:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_batches_go_on_from_any_step() -> None:
    """A resumed run sees the samples that an uninterrupted one would have seen."""
    whole = [(b.first, b[:][1].tolist()) for b in Batches(Squares(10), 4, seed=3, steps=9)]
    later = [(b.first, b[:][1].tolist()) for b in Batches(Squares(10), 4, 3, first_step=5, steps=4)]
    assert [first for first, _ in whole] == [4 * step for step in range(9)]
    assert whole[5:] == later
    epoch = [y for _, samples in whole[:5] for y in samples][:10]
    assert sorted(epoch) == [i**2 for i in range(10)]


def test_training_has_no_end_unless_steps_are_given() -> None:
    assert len(list(islice(Batches(Squares(2), 4, seed=0), 100))) == 100


def test_validation_visits_everything_once_in_order() -> None:
    batches = Batches(Squares(10), 4, seed=None)
    assert batches.steps == 3
    assert [len(b) for b in batches] == [4, 4, 2]
    seen = [int(y) for b in batches for y in b[:][1]]
    assert seen == [i**2 for i in range(10)]
    assert [len(b) for b in Batches(Squares(10), 4, None, steps=2)] == [4, 4]
    assert [len(b) for b in Batches(Squares(10), 4, None, steps=9)] == [4, 4, 2]


def test_bad_batches_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size=0"):
        Batches(Squares(3), 0, 1)

    class Ragged(Squares):
        def __getitem__(self, index: int) -> Any:
            return (np.zeros(index + 1),)

    with pytest.raises(UserError, match=r"sample 1 .*\(2,\).*sample 0 .*\(1,\)"):
        Batch(Ragged(3), np.arange(2), 0)[:]


def test_what_a_factory_may_return() -> None:
    one, two = Squares(3), Squares(2)
    assert as_data(one) == Data(one)
    assert as_data((one, two)) == Data(one, two)
    assert as_data((one, None)).val is None
    data = Data(one, info={"in_features": 3}, loss="mse")
    assert as_data(data) is data
    for made, match in ((None, "NoneType"), (Squares(0), "0 samples"), ((one, 5), "int")):
        with pytest.raises(UserError, match=match):
            as_data(made)


def test_regression_is_made_by_seed_and_sample() -> None:
    a, b, c = (regression(seed, samples=100, val_fraction=0.2, noise=0.0) for seed in (1, 1, 2))
    assert (len(a.train), len(a.val)) == (80, 20)  # type: ignore[arg-type]
    assert a.info == {"in_features": 16, "out_features": 1} and a.loss == "mse"
    for index in (79, 0):
        for x, y in zip(a.train[index], b.train[index], strict=True):
            np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a.train[0][0], c.train[0][0])
    assert not np.array_equal(a.train[0][0], a.val[0][0])  # type: ignore[index]
    with pytest.raises(IndexError):
        a.train[80]


def test_regression_is_linear_with_the_noise_asked_for() -> None:
    def residual(noise: float) -> float:
        x, y = next(iter(Batches(regression(0, noise=noise, samples=2000).train, 1000, 1)))[:]
        x = np.c_[x, np.ones(len(x))].astype(np.float64)
        return float(np.std(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]))

    assert residual(0.0) < 1e-5
    assert residual(0.5) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    "keys", [{"samples": 0}, {"in_features": -1}, {"out_features": 0}, {"noise": -1.0},
             {"val_fraction": 1.0}],
)  # fmt: skip
def test_bad_regression_is_refused(keys: dict[str, Any]) -> None:
    ((name, value),) = keys.items()
    with pytest.raises(UserError, match=f"data.{name}={value}"):
        regression(0, **keys)
