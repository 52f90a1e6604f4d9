"""With weights copied, our GPT and PyTorch's agree in loss and every gradient."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.models import GPT, NextTokenLoss
from tests.models.peer import PeerGPT, torch

VOCAB, LENGTH, LAYERS, HEADS, WIDTH = 37, 80, 3, 4, 32
BATCH, TOKENS = 3, 70  # more tokens than a tile of attention, and not a multiple of one
LIMIT = {"float32": 1e-5, "float64": 1e-10}


def pair(bias: bool, tie: bool, dtype: str) -> tuple[GPT, PeerGPT]:
    """Equal weights, biases and scales that are not those of a fresh model."""
    ours = GPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH, bias=bias, tie_embeddings=tie).name_parts()
    ours.to(np.dtype(dtype))
    random = np.random.default_rng(2)
    for name, parameter in ours.named_parameters():
        centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        parameter.data[...] = random.normal(centre, 0.2, parameter.shape)
    theirs = PeerGPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH, bias, tie).to(getattr(torch, dtype))
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_every_gradient(bias: bool, tie: bool, dtype: str) -> None:
    ours, theirs = pair(bias, tie, dtype)
    tokens, target = np.random.default_rng(4).integers(0, VOCAB, (2, BATCH, TOKENS))
    loss = NextTokenLoss()(ours(tokens), target)
    loss.backward()
    expected = theirs.loss(torch.tensor(tokens), torch.tensor(target))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LIMIT[dtype])
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    found = dict(ours.named_parameters())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        grad = found[name].grad
        assert grad is not None, name
        difference = np.abs(grad.numpy() - gradient).max()
        assert difference <= LIMIT[dtype] * scale, (name, difference / scale)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_state_dicts_are_exchanged_as_they_are(bias: bool, tie: bool) -> None:
    """nanoGPT's checkpoints may have a compiler's prefix, and the masks that it once stored."""
    ours, theirs = pair(bias, tie, "float32")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fresh = GPT(VOCAB, LENGTH, LAYERS, HEADS, WIDTH, bias=bias, tie_embeddings=tie).name_parts()
    state = {f"_orig_mod.{name}": value for name, value in theirs.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH)
    state["_orig_mod.transformer.h.2.attn.masked_bias"] = torch.tensor(-1e4)
    fresh.load_state_dict(state)
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        np.testing.assert_array_equal(parameter.numpy(), theirs.state_dict()[name].numpy())
