"""A limit of memory: what would fit is said, and is true."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest

import hpcml
from hpcml import memory
from hpcml.comm import Mesh
from hpcml.errors import MemoryLimitError
from hpcml.parallel import Step
from tests.parallel.cases import make

LAYERS, WIDTH, TOKENS, SAMPLES = 4, 64, 16, 12


def model() -> hpcml.nn.Module:
    return hpcml.models.GPT(11, TOKENS, layers=LAYERS, heads=2, width=WIDTH)


def trained(limit: int, **options: object) -> Step:
    """A step of a fresh GPT under a limit beyond what is in use."""
    gc.collect()
    memory.set_limit(memory.account().total + limit)
    try:
        step = make("gpt", Mesh(), "float32", "adamw", model=model(), **options)  # type: ignore[arg-type]
        tokens = np.random.default_rng(0).integers(0, 11, (2, SAMPLES, TOKENS))
        step((tokens[0], tokens[1]))
        return step
    finally:
        memory.set_limit(0)


def test_states_that_do_not_fit_and_the_stage_that_does() -> None:
    count = sum(p.numel() for p in model().parameters())
    limit = 14 * count  # less than 16 bytes a parameter, more than 16 / 2 and some activations

    def program(stage: int) -> str:
        try:
            trained(limit, zero=stage, microbatch=1)
        except MemoryLimitError as error:
            return str(error)
        return ""

    said = hpcml.run(lambda: program(0), ranks=2)
    for text in said:
        first, *rest = text.splitlines()
        assert "optim exceed the memory limit" in first
        assert any("where did all the memory go" in line for line in rest)
        stages = [int(n) for n in re.findall(r"zero\.stage=(\d): needs at least", text)]
        assert stages == [1, 2, 3]
    assert hpcml.run(lambda: program(3), ranks=2) == ["", ""]


def test_activations_that_do_not_fit_and_the_microbatch_that_does() -> None:
    step = trained(1 << 30)
    states = sum(memory.account().live[kind] for kind in ("params", "grads", "optim"))
    needed = memory.account().peak["activations"]
    del step
    with pytest.raises(MemoryLimitError) as caught:
        trained(states + needed // 2)
    text = str(caught.value)
    assert "of activations exceed the memory limit" in text.splitlines()[0]
    (most,) = re.findall(r"train\.microbatch=(\d+), at most: 12 samples were under way", text)
    assert 1 <= int(most) < SAMPLES
    trained(states + needed // 2, microbatch=int(most) // 2)


@pytest.mark.parametrize("options", [{"staleness": 2}, {"elastic": 0.3, "staleness": 1}])
def test_sums_under_way_that_do_not_fit(options: dict[str, float]) -> None:
    """Every refusal says what needs less, whatever it was that did not fit, and that fits."""
    count = 4 * sum(p.numel() for p in model().parameters())

    def refusal(limit: int, **other: object) -> str:
        try:
            hpcml.run(
                lambda: trained(limit, mode="async", microbatch=1, **options | other), ranks=2
            )
        except MemoryLimitError as error:
            return str(error)
        return ""

    limits = [count * eighths // 8 for eighths in range(30, 72, 3)]
    said = [refusal(limit) for limit in limits]
    refused = [text for text in said if text]
    assert refused and not said[-1]
    words = ("what needs less: ", "what would fit:", "neither a higher zero.stage nor")
    assert all(any(word in text for word in words) for text in refused)
    late = next(
        i for i, text in reversed(list(enumerate(said))) if "data_parallel.staleness" in text
    )
    fewer = int(options["staleness"]) - 1
    assert f"data_parallel.staleness={fewer}, data_parallel.mode=sync with" in said[late]
    assert not refusal(limits[late], staleness=fewer)


def test_the_end_of_a_step_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = trained(1 << 30)

    def norm() -> float:
        memory.set_limit(memory.account().total)
        return float(memory.empty((9,), np.uint8, "buffers").size)

    monkeypatch.setattr(step.zero, "norm", norm)
    tokens = np.zeros((2, SAMPLES, TOKENS), np.int64)
    with pytest.raises(MemoryLimitError, match=r"neither a higher zero\.stage nor"):
        step((tokens[0], tokens[1]))
