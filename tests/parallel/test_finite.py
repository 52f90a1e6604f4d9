"""A number that is not finite is found where it began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcml import backend, nn, rng
from hpcml.autograd import Tensor
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel.finite import Finding, describe, first_bad_module, first_bad_parameter

Array = np.ndarray[Any, Any]
TOKENS = np.arange(12).reshape(2, 6)
PRECISIONS = ["fp32", "bf16", "fp16"]


class Statistics(nn.Module):
    """Notes the mean of its input, in place and as a new array, and how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.mean = 0, np.zeros(2)
        self.latest = Tensor(np.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean += x.data.mean(0)
        self.latest.data[...] = x.data.mean(0)
        self.latest = Tensor(x.data.mean(0))
        self.added = True
        return x


def values(model: nn.Module) -> Iterator[tuple[str, Array]]:
    return ((name, parameter.data) for name, parameter in model.named_parameters())


def gradients(model: nn.Module) -> list[tuple[str, Array]]:
    found = [(name, p.gradient) for name, p in model.named_parameters()]
    return [(name, g) for name, g in found if g is not None]


def gpt(name: str = "fp32") -> GPT:
    model = GPT(12, 6, 2, 2, 8, dropout=0.1).name_parts()
    return model.to(backend.dtype(name))


def loss(model: GPT) -> Tensor:
    with rng.samples(3, 0):
        found: Tensor = NextTokenLoss()(model(TOKENS), TOKENS)
    return found


@pytest.mark.parametrize("name", PRECISIONS)
def test_nothing_is_found_where_all_is_finite(name: str) -> None:
    model = gpt(name)
    loss(model).backward()
    before = [(key, g.copy()) for key, g in gradients(model)]
    assert describe(values(model), model, lambda: loss(model), gradients(model)) == ""
    for (_, a), (_, b) in zip(before, gradients(model), strict=True):
        np.testing.assert_array_equal(a.astype(float), b.astype(float))
    assert not any(m.hooks.after for m in model.modules())


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_weight(name: str) -> None:
    model = gpt(name)
    places = dict(model.named_parameters())
    places["transformer.h.1.mlp.c_fc.weight"].data[0, :3] = np.inf
    places["transformer.h.0.ln_2.weight"].data[2] = np.nan
    places["transformer.h.0.ln_2.weight"].data[3:5] = -np.inf
    text = describe(values(model), model, lambda: pytest.fail("not needed"), [])
    where = "parameter transformer.h.0.ln_2.weight"
    assert text == f"{where} is not finite: 2 inf and 1 nan of 8 values"


def test_all_parameters_are_asked_for_and_valid_until_the_next() -> None:
    asked: list[str] = []

    def given() -> Iterator[tuple[str, Array]]:
        array = np.ones(2)
        for name, value in (("a", 1), ("b", np.nan), ("c", np.inf)):
            array[...] = value
            yield name, array
            array[...] = 0
            asked.append(name)

    assert first_bad_parameter([("count", np.ones(2, int))]) is None
    assert str(first_bad_parameter(given())) == "parameter b is not finite: 2 nan of 2 values"
    assert asked == ["a", "b", "c"]


def test_what_other_ranks_have_found_counts() -> None:
    model = gpt()
    told: list[Finding | None] = []

    def agree(mine: Finding | None) -> str:
        told.append(mine)
        return str(mine or ("theirs" if len(told) == 2 else ""))

    assert describe(values(model), model, lambda: loss(model), [], agree) == "theirs"
    assert told == [None, None]
    model.transformer.wte.weight.data[0] = np.nan
    assert "wte" in describe(values(model), model, lambda: loss(model), [], agree)


@pytest.mark.parametrize("name", PRECISIONS)
def test_an_activation_of_a_nested_module(name: str) -> None:
    model = gpt(name)
    calls: list[int] = []

    def spoil(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        calls.append(1)
        factor = np.ones(out.shape, out.dtype)
        factor[1, 2, :5] = np.inf
        return out * factor

    handle = model.transformer.h[1].mlp.gelu.register_forward_hook(spoil)
    found = first_bad_module(model, lambda: loss(model))
    assert found is not None and len(calls) == 1
    assert found.what == "output of transformer.h.1.mlp.gelu (GELU)"
    assert found.infinite == 5 and found.size == 2 * 6 * 32 and not found.already
    handle.remove()
    assert first_bad_module(model, lambda: loss(model)) is None


def test_an_overflow_of_float16() -> None:
    """Values that a larger range would hold."""
    model = gpt("fp16")
    model.transformer.ln_f.weight.data[...] = 100
    model.transformer.wte.weight.data[...] *= np.float16(5e4)
    text = describe(values(model), model, lambda: loss(model), [])
    assert text.startswith("output of lm_head (Linear) is not finite: ") and "input" not in text
    assert describe(values(model), model.float(), lambda: loss(model), []) == ""


def test_an_input() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    x = np.ones((4, 3), np.float32)
    x[1, 1] = np.nan
    found = first_bad_module(model, lambda: model(Tensor(x)))
    assert str(found) == (
        "output of 0 (Linear) is not finite: 2 nan of 8 values, and so was its input"
    )


def test_the_model_itself_the_loss_and_outputs_of_several_parts() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"mean": x.mean(), "none": None, "parts": [x, (x / 0, 3)]}

    x = Tensor(np.ones((2, 3), np.float32))
    found = first_bad_module(Pair(), lambda: None) or first_bad_module(
        (pair := Pair()), lambda: pair(x)
    )
    assert str(found) == "output of the model (Pair) is not finite: 6 inf of 6 values"
    model = nn.ReLU()
    assert first_bad_module(model, lambda: model(x)) is None
    found = first_bad_module(model, lambda: (model(x) - 1).log().sum())
    assert str(found) == "the loss is not finite: 1 inf of 1 values"


def test_a_gradient() -> None:
    model = gpt()
    loss(model).backward()
    for name, g in gradients(model):
        if name in ("transformer.h.1.ln_1.bias", "transformer.wpe.weight"):
            g[0] = np.nan
    text = describe(values(model), model, lambda: loss(model), gradients(model))
    assert text == "gradient of transformer.wpe.weight is not finite: 8 nan of 48 values"


def test_running_again_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Statistics(), nn.Dropout(0.5)).name_parts()
    statistics: Any = model[1]
    x = Tensor(np.ones((3, 2), np.float32), requires_grad=True)
    model(x)
    mean, latest, calls = statistics.mean, statistics.latest, statistics.calls
    before = mean.copy(), latest.data.copy()
    delattr(statistics, "added")
    with rng.samples(1, 0):
        assert first_bad_module(model, lambda: model(x)) is None
    assert statistics.mean is mean and statistics.latest is latest and statistics.calls == calls
    np.testing.assert_array_equal(mean, before[0])
    np.testing.assert_array_equal(latest.data, before[1])
    assert not hasattr(statistics, "added")
    assert all(p.gradient is None for p in model.parameters()) and x.gradient is None


def test_hooks_are_taken_away_if_running_fails() -> None:
    model = gpt()

    def run() -> Tensor:
        loss(model)
        raise KeyError("a")

    with pytest.raises(KeyError):
        first_bad_module(model, run)
    assert not any(m.hooks.after for m in model.modules())
