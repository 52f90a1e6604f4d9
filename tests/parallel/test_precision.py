"""The loss scale as a function of the overflows."""

from __future__ import annotations

import numpy as np

from hpcml.autograd import Tensor
from hpcml.parallel.precision import LossScaler


def scales(overflows: dict[int, int], steps: int) -> list[float]:
    """The scale of each step; overflows[k] in a row from step k."""
    scaler, found = LossScaler(), []
    for step in range(steps):
        found.append(scaler.scale)
        scaler.update(any(first <= step < first + n for first, n in overflows.items()))
    return found


def test_it_is_halved_by_an_overflow_and_doubled_by_2000_good_steps() -> None:
    found = scales({3: 2}, 4010)
    assert found[:4] == [65536.0] * 4 and found[4] == 32768
    assert found[5 : 5 + 2000] == [16384.0] * 2000
    assert found[2005:4005] == [32768.0] * 2000 and found[4005] == 65536


def test_an_overflow_begins_the_count_anew() -> None:
    found = scales({1999: 1}, 4001)
    assert found[1999] == 65536 and found[2000:4000] == [32768.0] * 2000 and found[4000] == 65536


def test_it_ends_at_1_and_says_so() -> None:
    scaler = LossScaler()
    for _ in range(16):
        assert not scaler.exhausted
        scaler.update(True)
    assert scaler.scale == 1 and scaler.exhausted
    scaler.update(True)
    assert scaler.scale == 1
    for _ in range(2000):
        scaler.update(False)
    assert scaler.scale == 2 and not scaler.exhausted


def test_small_gradients_of_float16_survive() -> None:
    """What the scale is for: a gradient of 1e-8, below the smallest float16 by half."""
    for scale, expected in ((1.0, 0.0), (LossScaler().scale, 1e-8)):
        x = Tensor(np.ones(3, np.float16), requires_grad=True)
        loss = (x.float() * 1e-8).sum()
        loss.backward(np.asarray(scale, loss.dtype))
        np.testing.assert_allclose(x.gradient.astype(float) / scale, expected, rtol=1e-3)  # type: ignore[union-attr]
