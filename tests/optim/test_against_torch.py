"""Ten steps of each optimizer, on the same gradients, against PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import optim
from hpcml.autograd import Tensor
from hpcml.nn import Parameter

torch = pytest.importorskip("torch")

SHAPES = [(3, 5), (7,), (), (17, 3), (1, 1)]  # none fills a cache line
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("Adam", {}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}),
]
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


def pair(dtype: str) -> tuple[list[Parameter], list[Any]]:
    """The same parameters twice: ours and PyTorch's."""
    random = np.random.default_rng(5)
    values = [np.asarray(random.normal(size=shape), dtype) for shape in SHAPES]
    ours = [Parameter(value.copy()) for value in values]
    return ours, [torch.nn.Parameter(torch.tensor(value)) for value in values]


def walk(made: optim.Optimizer, peer: Any, ours: Any, theirs: Any, steps: int = 10) -> None:
    """Step both on gradients of very different sizes."""
    random = np.random.default_rng(6)
    for _ in range(steps):
        made.zero_grad()
        for own, other in zip(ours, theirs, strict=True):
            gradient = random.normal(size=own.shape) * 10.0 ** random.integers(-4, 3)
            gradient = np.asarray(gradient, own.dtype)
            own.grad = Tensor(gradient)
            other.grad = torch.tensor(gradient)
        made.step()
        peer.step()


def assert_same(ours: Any, theirs: Any, dtype: str) -> None:
    for own, other in zip(ours, theirs, strict=True):
        expected = other.detach().numpy()
        assert own.numpy().dtype == expected.dtype
        limit = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(own.numpy(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_ten_steps(kind: str, settings: dict[str, Any], dtype: str) -> None:
    ours, theirs = pair(dtype)
    made = getattr(optim, kind)(ours, **settings)
    peer = getattr(torch.optim, kind)(theirs, **{"lr": 1e-3, **settings})
    walk(made, peer, ours, theirs)
    assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_groups_with_settings_of_their_own(kind: str, settings: dict[str, Any], dtype: str) -> None:
    ours, theirs = pair(dtype)

    def groups(p: list[Any]) -> list[dict[str, Any]]:
        own = {"lr": 0.03, "weight_decay": 0.2}
        return [{"params": p[3:]}, {"params": p[:2], **own}, {"params": [p[2]], "lr": 0.0}]

    made = getattr(optim, kind)(groups(ours), **settings)
    peer = getattr(torch.optim, kind)(groups(theirs), **{"lr": 1e-3, **settings})
    walk(made, peer, ours, theirs)
    assert_same(ours, theirs, dtype)


def test_momentum_of_some_groups() -> None:
    """Momentum that only a group asks for is kept; the others go without."""
    ours, theirs = pair("float64")

    def groups(p: list[Any]) -> list[dict[str, Any]]:
        own = {"momentum": 0.9, "nesterov": True}
        return [{"params": p[:2]}, {"params": p[2:], **own}]

    made, peer = optim.SGD(groups(ours), lr=0.1), torch.optim.SGD(groups(theirs), lr=0.1)
    walk(made, peer, ours, theirs)
    assert_same(ours, theirs, "float64")


def test_rates_that_change_between_steps() -> None:
    ours, theirs = pair("float64")
    made, peer = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for rate in (0.1, 0.01, 0.5):
        for group in [*made.param_groups, *peer.param_groups]:
            group["lr"] = rate
        walk(made, peer, ours, theirs, 1)
    assert_same(ours, theirs, "float64")


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e9])
@pytest.mark.parametrize("size", [0.0, 1e-3, 10.0])
def test_clipping(max_norm: float, size: float) -> None:
    """The norm, and a clipped step, as with clip_grad_norm_."""
    ours, theirs = pair("float64")
    made, peer = optim.SGD(ours, lr=1.0), torch.optim.SGD(theirs, lr=1.0)
    for own, other in zip(ours, theirs, strict=True):
        gradient = size * np.random.default_rng(own.numel()).normal(size=own.shape)
        own.grad, other.grad = Tensor(np.asarray(gradient)), torch.tensor(gradient)
    norm = made.grad_norm()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-13)
    made.step(optim.clip_scale(norm, max_norm))
    peer.step()
    assert_same(ours, theirs, "float64")
