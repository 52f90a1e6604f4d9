"""Sampling: from known logits, and from a small GPT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.models import GPT, generate


class Fixed(nn.Module):
    """The same logits whatever the tokens, which it notes."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = np.array(logits, np.float32)
        self.seen: list[np.ndarray] = []

    def forward(self, tokens: Any) -> Tensor:
        self.seen.append(np.array(tokens))
        return Tensor(np.broadcast_to(self.logits, (*tokens.shape, self.logits.size)))


def gpt() -> GPT:
    hpcml.manual_seed(1)
    return GPT(13, 8, layers=1, heads=2, width=16).name_parts()


START = np.array([3, 1])


def test_repeatable_by_seed() -> None:
    runs = [generate(gpt(), START, 20, length=8, seed=seed) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    np.testing.assert_array_equal(runs[0][:2], START)
    assert runs[0].shape == (22,)
    shorter = generate(gpt(), START, 9, length=8, seed=5)
    np.testing.assert_array_equal(shorter, runs[0][:11], "a draw depends on its position alone")


def test_temperature_zero_is_the_most_likely() -> None:
    model = gpt()
    found = generate(model, START, 12, length=8, temperature=0)
    expected = list(START)
    for _ in range(12):
        logits = model(np.array([expected[-8:]])).numpy()[0, -1]
        expected.append(int(logits.argmax()))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(generate(model, START, 12, length=8, top_k=1), expected)


def test_frequencies() -> None:
    """Those of softmax(logits / temperature), of the `top_k` most likely if asked for."""
    logits, count = [0.0, 1.0, 2.0, -1.0], 4000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2), (2.0, 3), (1.0, 99)):
        weights = np.exp(np.array(logits) / temperature)
        kept = np.argsort(logits)[-top_k:] if 0 < top_k < 4 else np.arange(4)
        expected = np.zeros(4)
        expected[kept] = weights[kept] / weights[kept].sum()
        made = generate(Fixed(logits), START, count, length=2, temperature=temperature, top_k=top_k)
        share = np.bincount(made[2:], minlength=4) / count
        assert (share[expected == 0] == 0).all()
        assert (np.abs(share - expected) < 4 * np.sqrt(0.25 / count)).all(), (share, expected)


def test_the_model_sees_the_last_tokens() -> None:
    model = Fixed([0.0, 5.0])
    made = generate(model, np.array([0, 1, 0]), 3, length=4)
    windows = [seen[0].tolist() for seen in model.seen]
    assert windows == [made[:3].tolist(), made[:4].tolist(), made[1:5].tolist()]


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool) -> None:
    model = GPT(13, 8, layers=1, heads=2, width=16, dropout=0.9).name_parts().train(training)
    model.transformer.drop.eval()
    made = [generate(model, START, 8, length=8) for _ in range(2)]
    np.testing.assert_array_equal(made[0], made[1], "no dropout")
    assert model.training is training and model.transformer.h.training is training
    assert model.transformer.drop.training is False


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        generate(gpt(), np.array([], np.int64), 3, length=8)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(gpt(), START, 3, length=8, temperature=-1)
