"""GPT in bfloat16 and float16: memory, and loss and gradients beside float32 and PyTorch."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import backend, memory
from hpcml.models import GPT, NextTokenLoss

VOCAB, LENGTH, LAYERS, HEADS, WIDTH, BATCH = 37, 70, 3, 4, 64, 3
TOKENS, TARGET = np.random.default_rng(4).integers(0, VOCAB, (2, BATCH, LENGTH))
# Of a gradient's norm: a few roundings (2^-9, 2^-12 on average) in each of some 40 operations.
LIMIT = {"bf16": 0.03, "fp16": 0.004}


def model(name: str) -> GPT:
    hpcml.manual_seed(3)
    made = GPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH).name_parts().to(backend.dtype(name))
    for parameter in made.parameters():
        assert parameter.data.dtype == backend.dtype(name)
    return made


def distance(a: Any, b: Any) -> float:
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gradients(ours: GPT) -> dict[str, Any]:
    loss = NextTokenLoss()(ours(TOKENS), TARGET)
    loss.backward()
    return {"loss": loss.numpy(), **{n: p.gradient for n, p in ours.named_parameters()}}


@pytest.mark.parametrize("name", LIMIT)
def test_first_values_are_those_of_float32_rounded(name: str) -> None:
    exact = model("fp32").state_dict()
    for key, value in model(name).state_dict().items():
        np.testing.assert_array_equal(
            value.float().numpy(), exact[key].numpy().astype(value.dtype).astype(np.float32)
        )


@pytest.mark.parametrize("name", LIMIT)
def test_activations_take_half_the_memory(name: str) -> None:
    """Beside what is kept for backward, one operation's float32 at a time."""
    kept, most = {}, {}
    account = memory.account()
    for kind in ("fp32", name):
        ours = model(kind)
        gc.collect()
        before = account.live["activations"]
        account.reset_peak()
        loss = NextTokenLoss()(ours(TOKENS), TARGET)
        kept[kind] = account.live["activations"] - before
        most[kind] = account.peak["activations"] - before
        loss.backward()
        del loss
        gc.collect()
        assert account.live["activations"] - before == sum(
            p.gradient.nbytes for p in ours.parameters()
        )
    assert kept[name] < 0.52 * kept["fp32"]
    assert most[name] < 0.7 * most["fp32"]


@pytest.mark.parametrize("name", LIMIT)
def test_loss_and_gradients_are_those_of_float32_to_the_precision(name: str) -> None:
    found, exact = gradients(model(name)), gradients(model("fp32"))
    assert found["loss"].dtype == np.float32
    for key, value in exact.items():
        assert distance(found[key], value) < LIMIT[name], key


@pytest.mark.parametrize("name", LIMIT)
def test_loss_and_gradients_are_those_of_torch_to_the_precision(name: str) -> None:
    """No farther from float32 than PyTorch's own 16-bit computation, within a factor."""
    from tests.models.peer import PeerGPT, torch

    exact, ours = model("fp32"), model(name)
    theirs = PeerGPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH, True, True)
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in exact.state_dict().items()})
    theirs.to(getattr(torch, str(backend.dtype(name))))
    loss = theirs.loss(torch.tensor(TOKENS), torch.tensor(TARGET))
    loss.backward()
    peer = {n: p.grad.float().numpy() for n, p in theirs.named_parameters()}
    peer["loss"] = np.array(loss.item())
    found, reference = gradients(ours), gradients(exact)
    for key, value in reference.items():
        assert distance(found[key], peer[key]) < 2 * LIMIT[name], key
        limit = 1.5 * distance(peer[key], value) + 0.1 * LIMIT[name]
        assert distance(found[key], value) < limit, key
