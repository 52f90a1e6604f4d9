"""The learning rate against nanoGPT's formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml.optim import learning_rate


def nanogpt(it: int, lr: float, warmup: int, decay_steps: int, min_lr: float) -> float:
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    if it > decay_steps:
        return min_lr
    ratio = (it - warmup) / (decay_steps - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)


@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 300))
def test_as_nanogpt(warmup: int, rest: int, step: int) -> None:
    steps = warmup + rest
    found = learning_rate(step, lr=1e-3, schedule="cosine", warmup=warmup, min_lr=1e-4, steps=steps)
    assert found == pytest.approx(nanogpt(step, 1e-3, warmup, steps, 1e-4), rel=1e-12)


def test_end_points() -> None:
    def at(step: int, schedule: str = "cosine") -> float:
        return learning_rate(step, lr=1.0, schedule=schedule, warmup=4, min_lr=0.1, steps=104)

    assert [at(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert at(4) == 1.0
    assert at(54) == pytest.approx(0.55)
    assert at(104) == at(10**6) == 0.1
    assert all(at(step) > at(step + 1) for step in range(4, 104))
    assert [at(step, "constant") for step in (3, 4, 103, 10**6)] == [0.8, 1.0, 1.0, 1.0]


def test_warm_up_longer_than_the_run() -> None:
    rates = [
        learning_rate(step, lr=1.0, schedule="cosine", warmup=10, min_lr=0.1, steps=5)
        for step in range(12)
    ]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10:] == [0.1, 0.1]
