"""Layers and functions in bfloat16 and float16 beside float32, to the precision of the type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from hpcml import backend, nn, rng
from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from tests.autograd.support import Array, leaf, normal

LIMIT = {"bf16": 2.0**-7, "fp16": 2.0**-10}  # of the norm, for a handful of operations
MASK = normal(5, 5) > 0.8
IMAGE, FILTER, BIAS = normal(2, 3, 8, 7), normal(4, 3, 3, 2), normal(4)
QUERY, KEY, VALUE = (normal(2, 3, 5, 4, salt=i) for i in range(3))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, MASK, dropout_p=0.2, name="mask")


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[Array]]] = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1), [IMAGE, FILTER, BIAS]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), [IMAGE]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), [IMAGE]),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, None, 2), [IMAGE, FILTER[:3]]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
                   [IMAGE, BIAS[:3], BIAS[1:]]),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), [IMAGE]),
    "pad": (lambda x: F.pad(x, (2, 1, 0, 3), "reflect"), [IMAGE]),
    "mse_loss": (lambda x, y: F.mse_loss(x, y) * 2, [IMAGE, normal(*IMAGE.shape, salt=3)]),
    "cross_entropy of pictures": (lambda x: F.cross_entropy(x, np.ones((2, 8, 7), int)), [IMAGE]),
    "attention": (partial(F.scaled_dot_product_attention, is_causal=True), [QUERY, KEY, VALUE]),
    "attention with a mask": (masked, [QUERY, KEY, VALUE]),
    "dropout": (lambda x: F.dropout(x, 0.4), [IMAGE]),
    "variance": (lambda x: x.var((0, 2), keepdim=True) + x.std(1).mean(), [IMAGE]),
}  # fmt: skip


def assert_near(found: Any, exact: Any, name: str, factor: float = 1) -> None:
    a, b = (np.asarray(x).astype(np.float64) for x in (found, exact))
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= factor * LIMIT[name] * np.linalg.norm(b)


@pytest.mark.parametrize("name", LIMIT)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str, name: str) -> None:
    compute, arrays = FUNCTIONS[function]
    results = []
    for kind in (name, "fp32"):
        inputs = [leaf(a.astype(backend.dtype(name)).astype(backend.dtype(kind))) for a in arrays]
        with rng.samples(5, 0):
            out = compute(*inputs)
        assert out.dtype == backend.dtype(kind if out.ndim else "fp32")
        out.backward(normal(*out.shape, salt=9))
        results.append([out.data, *[x.gradient for x in inputs]])
    for found, exact in zip(*results, strict=True):
        assert_near(found, exact, name)


@pytest.mark.parametrize("name", LIMIT)
@pytest.mark.parametrize("need_weights", [True, False])
def test_layers(need_weights: bool, name: str) -> None:
    """Every kind of layer in one model, trained by a loss whose gradient is 16 bits too."""
    results: list[dict[str, Any]] = []
    for kind in (name, "fp32"):
        model = nn.Module()
        model.table, model.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        model.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        model.tail = nn.Sequential(
            nn.Linear(8, 8), nn.GELU("tanh"), nn.Dropout(0.2), nn.Tanh(), nn.Sigmoid(), nn.ReLU()
        )
        model.name_parts().to(backend.dtype(name)).to(backend.dtype(kind))
        with rng.samples(1, 0):
            x = model.norm(model.table(np.arange(10).reshape(2, 5)))
            padding = np.arange(10).reshape(2, 5) == 4
            y, weights = model.attend(x, x, x, padding, need_weights, MASK & ~np.eye(5, dtype=bool))
            loss = F.cross_entropy(model.tail(y).flatten(0, 1), np.arange(10) % 8)
            loss.backward()
        assert weights is None or weights.dtype == backend.dtype(kind)
        assert loss.dtype == np.float32
        results.append({"loss": loss.data, **{n: p.gradient for n, p in model.named_parameters()}})
    for key, exact in results[1].items():
        assert results[0][key].dtype == backend.dtype("fp32" if key == "loss" else name)
        if not key.endswith("in_proj_bias"):  # that of the keys has no gradient but rounding
            assert_near(results[0][key], exact, name, 5)
