"""Sampling of text from a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import rng
from hpcml.nn import Module
from hpcml.nn.evaluation import evaluating

Predict = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""From tokens (1, T) to logits (1, T, vocabulary)."""


def generate(
    model: Module | Predict,
    tokens: np.ndarray[Any, Any],
    count: int,
    *,
    length: int,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> np.ndarray[Any, Any]:
    """Return `tokens` (T) followed by `count` sampled ones.

    Each is drawn from softmax(logits / temperature) of the last position (temperature 0: the most
    likely), among the `top_k` most likely if top_k > 0. The model sees the last `length` tokens.
    The draw of position i depends on (seed, i) alone. Raises ValueError for settings that choose
    nothing.
    """
    out = np.asarray(tokens, np.int64)
    if out.size == 0:
        raise ValueError("generate() continues tokens: give it at least one")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (the most likely) or more")
    key = rng.key(seed, "generate")
    draws = np.empty(count)
    rng.uniform(key, 0, draws)
    predict = _predictor(model) if isinstance(model, Module) else model
    for draw in draws:
        logits = predict(out[None, -length:])[0, -1].astype(np.float64)
        out = np.append(out, _choose(logits, draw, temperature, top_k))
    return out


def _predictor(model: Module) -> Predict:
    def predict(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with evaluating(model):
            return model(tokens).numpy()  # type: ignore[no-any-return]

    return predict


def _choose(logits: np.ndarray[Any, Any], draw: float, temperature: float, top_k: int) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < logits.size:
        logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    weights = np.exp(logits - logits.max())
    total = np.cumsum(weights)
    return int(min(np.searchsorted(total, draw * total[-1], side="right"), logits.size - 1))
