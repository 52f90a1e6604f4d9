"""GPT: names, sizes, first values, causality, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import memory
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss

NAMES = {  # nanoGPT's state dict for 1 layer, width 8, vocabulary 11, length 6, in its order
    "transformer.wte.weight": (11, 8),
    "transformer.wpe.weight": (6, 8),
    "transformer.h.0.ln_1.weight": (8,),
    "transformer.h.0.ln_1.bias": (8,),
    "transformer.h.0.attn.c_attn.weight": (24, 8),
    "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.attn.c_proj.weight": (8, 8),
    "transformer.h.0.attn.c_proj.bias": (8,),
    "transformer.h.0.ln_2.weight": (8,),
    "transformer.h.0.ln_2.bias": (8,),
    "transformer.h.0.mlp.c_fc.weight": (32, 8),
    "transformer.h.0.mlp.c_fc.bias": (32,),
    "transformer.h.0.mlp.c_proj.weight": (8, 32),
    "transformer.h.0.mlp.c_proj.bias": (8,),
    "transformer.ln_f.weight": (8,),
    "transformer.ln_f.bias": (8,),
    "lm_head.weight": (11, 8),
}


def small(**changes: Any) -> GPT:
    sizes = {"layers": 1, "heads": 2, "width": 8} | changes
    return GPT(11, 6, **sizes).name_parts()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_names_and_shapes_are_nanogpts(bias: bool, tie: bool) -> None:
    expected = {name: shape for name, shape in NAMES.items() if bias or "bias" not in name}
    model = small(bias=bias, tie_embeddings=tie)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == list(expected.items())
    own = [name for name, _ in model.named_parameters()]
    assert own == [name for name in expected if not tie or name != "lm_head.weight"]


def test_state_that_does_not_fit() -> None:
    state = {name: np.zeros(shape) for name, shape in NAMES.items()}
    state["transformer.wpe.weight"] = np.zeros((7, 8))
    del state["transformer.ln_f.bias"]
    with pytest.raises(UserError, match=r"wpe.weight has shape \(7, 8\).*ln_f.bias is missing"):
        small().load_state_dict(state)


@pytest.mark.parametrize(
    ("bias", "count"), [(True, 124_439_808), (False, 124_337_664)], ids=["bias", "no bias"]
)
def test_size_of_gpt2(bias: bool, count: int) -> None:
    """Published counts; nothing is allocated to count."""
    before = dict(memory.account().live)
    model = GPT(50257, 1024, layers=12, heads=12, width=768, bias=bias)
    assert sum(p.numel() for p in model.parameters()) == count
    assert memory.account().live == before
    assert not any(p.has_values for p in model.parameters())


def test_deviation_of_first_values() -> None:
    """GPT-2's: 0.02, and 0.02 / sqrt(2 layers) where a residual branch ends; biases zero."""
    layers = 3
    model = GPT(500, 64, layers=layers, heads=4, width=64, tie_embeddings=False).name_parts()
    for name, parameter in model.named_parameters():
        values = parameter.numpy().astype(np.float64)
        if name.endswith("bias"):
            assert not values.any(), name
        elif "ln_" in name:
            assert (values == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * layers) if "c_proj" in name else 0.02
            error = expected / math.sqrt(2 * values.size)
            assert abs(values.std() - expected) < 5 * error, name
            assert abs(values.mean()) < 5 * expected / math.sqrt(values.size), name


def test_first_loss_is_that_of_guessing() -> None:
    model = GPT(65, 32, layers=2, heads=2, width=64).name_parts()
    tokens, target = np.random.default_rng(0).integers(0, 65, (2, 8, 32))
    assert NextTokenLoss()(model(tokens), target).item() == pytest.approx(math.log(65), abs=0.05)


def test_first_values_do_not_depend_on_the_order_of_making() -> None:
    hpcml.manual_seed(7)
    one, other = small(layers=2), small(layers=2)
    forwards = {name: p.numpy() for name, p in one.named_parameters()}
    backwards = {name: p.numpy() for name, p in reversed(list(other.named_parameters()))}
    for name, values in forwards.items():
        np.testing.assert_array_equal(values, backwards[name], err_msg=name)
    drawn = [v for k, v in forwards.items() if v.ndim == 2]
    for i, values in enumerate(drawn):
        for later in drawn[i + 1 :]:
            assert not np.array_equal(values.ravel()[:20], later.ravel()[:20]), "equal starts"
    hpcml.manual_seed(8)
    assert not np.array_equal(small(layers=2).lm_head.weight.numpy(), one.lm_head.weight.numpy())


def test_logits_do_not_see_later_tokens() -> None:
    model = GPT(20, 80, layers=2, heads=2, width=16).name_parts()
    tokens = np.random.default_rng(0).integers(0, 20, (1, 80))
    logits = model(tokens).numpy()
    for changed in (0, 1, 63, 64, 79):
        others = tokens.copy()
        others[0, changed] = (others[0, changed] + 1) % 20
        found = model(others).numpy()
        np.testing.assert_array_equal(found[:, :changed], logits[:, :changed])
        assert (found[:, changed] != logits[:, changed]).any()


def test_dropout_only_while_training() -> None:
    model, tokens = small(dropout=0.5), np.arange(6)[None]
    kept, seen = model.eval()(tokens).numpy(), model.train()(tokens).numpy()
    assert not np.allclose(kept, seen)
    np.testing.assert_array_equal(model.eval()(tokens).numpy(), kept)


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="7 tokens, but sequence_length=6"):
        small()(np.zeros((1, 7), np.int64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 0}, "layers=0"),
        ({"width": -8}, "width=-8"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 3}, "heads=3 must divide width=8"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**change)
