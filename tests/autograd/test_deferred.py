"""Backward in two: activations first, parameters later, with the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml import Tensor, backend, nn, rng
from hpcml.autograd.backward import backward
from hpcml.models import GPT, NextTokenLoss


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6))
    hidden = x
    for block in model.transformer.h:
        hidden = block(hidden)
    logits = model.lm_head(model.transformer.ln_f(hidden + model.transformer.wte(tokens)))
    return NextTokenLoss()(logits, Tensor(tokens))


def made(dtype: str) -> tuple[nn.Module, Tensor]:
    model = GPT(11, 6, 2, 2, 8, dropout=0.1).to(backend.dtype(dtype)).name_parts()
    x = np.random.default_rng(1).standard_normal((2, 6, 8)).astype(backend.dtype(dtype))
    return model, Tensor(x, True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_same_gradients(dtype: str) -> None:
    """Of the input at once, of parameters later, of a tied one too; hooks run when whole."""
    with rng.samples(2, 0):
        (whole, x), (split, y) = made(dtype), made(dtype)
        loss_of(whole, x).backward()
    with rng.samples(2, 0):
        seen: list[str] = []
        for name, parameter in split.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        rest = backward(loss_of(split, y), defer=True)
    assert y.grad.numpy().tobytes() == x.grad.numpy().tobytes()
    assert not seen and all(p.grad is None for p in split.parameters())
    rest.compute()
    used = {name for name, p in whole.named_parameters() if p.grad is not None}
    assert set(seen) == used and len(seen) == len(used)
    for name, parameter in split.named_parameters():
        mine, theirs = parameter.grad, dict(whole.named_parameters())[name].grad
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.numpy().tobytes() == theirs.numpy().tobytes(), name
    before = split.lm_head.weight.grad.numpy().copy()
    rest.compute()  # nothing is left
    np.testing.assert_array_equal(split.lm_head.weight.grad.numpy(), before)


def test_another_backward_may_come_between() -> None:
    """As in a pipeline: the weights of one microbatch after the activations of the next."""
    with rng.samples(2, 0):
        (whole, x), (split, y) = made("float64"), made("float64")
        for _ in range(2):
            loss_of(whole, x).backward()
    with rng.samples(2, 0):
        first = backward(loss_of(split, y), defer=True)
        second = backward(loss_of(split, y), defer=True)
    first.compute()
    second.compute()
    for mine, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            np.testing.assert_allclose(mine.grad.numpy(), theirs.grad.numpy(), 1e-12, 1e-15)


def test_a_plain_leaf_gets_its_gradient_at_once() -> None:
    x, w = Tensor(np.ones(3), True), nn.Parameter(np.full(3, 2.0))
    rest = backward((x * w).sum(), defer=True)
    np.testing.assert_array_equal(x.grad.numpy(), [2, 2, 2])
    assert w.grad is None
    rest.compute()
    np.testing.assert_array_equal(w.grad.numpy(), [1, 1, 1])
