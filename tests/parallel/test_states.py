"""The formulas of the model states against the paper's tables, and the advice built on them."""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest

from hpcml.errors import MemoryLimitError
from hpcml.parallel.states import STAGES, advice, fitting_stages, model_states

GB = 10**9

# Rajbhandari et al. 2019, Table 1: gigabytes per device at stages 1, 2, 3, as printed.
MODELS = {"7.5B": 7_500_000_000, "128B": 128 * GB, "1T": 1000 * GB}
TABLE_1 = """
       | 7.5B            | 128B          | 1T
1      | 120  120  120   | 2048 2048 2048| 16000 16000 16000
4      | 52.5 41.3 30    | 896  704  512 | 7000  5500  4000
16     | 35.6 21.6 7.5   | 608  368  128 | 4750  2875  1000
64     | 31.4 16.6 1.88  | 536  284  32  | 4187  2218  250
256    | 30.4 15.4 0.47  | 518  263  8   | 4046  2054  62.5
1024   | 30.1 15.1 0.12  | 513  257  2   | 4011  2013  15.6
"""


def table_1() -> list[tuple[int, str, int, str]]:
    """Its cells: ranks, model, stage, gigabytes as printed."""
    header, *rows = [line.split("|") for line in TABLE_1.strip("\n").splitlines()]
    return [
        (int(ranks), model.strip(), stage, text)
        for ranks, *groups in rows
        for model, group in zip(header[1:], groups, strict=True)
        for stage, text in enumerate(group.split(), 1)
    ]


def total(stage: int, ranks: int, precision: str = "bf16", states: int = 2) -> float:
    return sum(model_states(stage, ranks, precision, states).values())


def as_printed(value: float, like: str) -> str:
    """With as many decimals as `like`: the table rounds fractions and cuts them off whole numbers.

    Its 2218 is 2218.75, and its 41.3 is 41.25.
    """
    _, dot, decimals = like.partition(".")
    unit = Decimal(1).scaleb(-len(decimals))
    return str(Decimal(value).quantize(unit, ROUND_HALF_UP if dot else ROUND_DOWN))


def test_the_paper_s_first_table_has_54_cells() -> None:
    assert len(table_1()) == 54 == len({cell[:3] for cell in table_1()})


@pytest.mark.parametrize(("ranks", "model", "stage", "printed"), table_1())
def test_table_1(ranks: int, model: str, stage: int, printed: str) -> None:
    assert as_printed(MODELS[model] * total(stage, ranks) / GB, printed) == printed


@pytest.mark.parametrize(
    ("model", "stage", "ranks"),
    [("7.5B", 1, 64), ("7.5B", 2, 16), ("7.5B", 3, 4), ("128B", 3, 64), ("1T", 3, 1024)],
)
def test_the_fewest_ranks_with_which_32_gigabytes_hold_a_model(
    model: str, stage: int, ranks: int
) -> None:
    """The bold cells of Table 1."""
    holding = [n for n in (1, 4, 16, 64, 256, 1024)
               if stage in fitting_stages(MODELS[model], n, "fp16", 32 * GB)]  # fmt: skip
    assert holding[0] == ranks


@pytest.mark.parametrize("degree", [1, 2, 4, 8, 16])
def test_table_2(degree: int) -> None:
    """The largest model on 32 GB and 64 ranks: its rows are the first times model parallelism.

    That is, times the first row as printed: exactly, 4 times stage 1 would be 30.57 billion.
    """
    printed = {  # billions
        1: ("2", "7.6", "14.4", "128"),
        2: ("4", "15.2", "28.8", "256"),
        4: ("8", "30.4", "57.6", "512"),
        8: ("16", "60.8", "115.2", "1024"),
        16: ("32", "121.6", "230.4", "2048"),
    }
    for stage, text in zip(STAGES, printed[degree], strict=True):
        largest = as_printed(32 / total(stage, 64), printed[1][stage])
        assert Decimal(largest) * degree == Decimal(text)
        params = int(Fraction(32 * GB) / Fraction(total(stage, 64)))
        assert stage in fitting_stages(params, 64, "bf16", 32 * GB)
        assert stage not in fitting_stages(params + 1, 64, "bf16", 32 * GB)


def test_figure_1() -> None:
    """7.5 billion parameters on 64 ranks: gigabytes at stages 0 to 3."""
    found = [7.5 * total(stage, 64) for stage in STAGES]
    assert [f"{gigabytes:.1f}" for gigabytes in found] == ["120.0", "31.4", "16.6", "1.9"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("precision", "states", "whole"),
    [
        ("bf16", 2, (2, 2, 12)),
        ("fp16", 2, (2, 2, 12)),
        ("fp32", 2, (4, 4, 8)),
        ("fp64", 2, (8, 8, 16)),
        ("fp32", 0, (4, 4, 0)),
        ("fp32", 1, (4, 4, 4)),
        ("bf16", 0, (2, 2, 4)),
        ("bf16", 1, (2, 2, 8)),
    ],
)
def test_bytes_by_category(
    precision: str, states: int, whole: tuple[int, int, int], ranks: int
) -> None:
    params, grads, optim = whole
    assert [tuple(model_states(s, ranks, precision, states).values()) for s in STAGES] == [
        (params, grads, optim),
        (params, grads, optim / ranks),
        (params, grads / ranks, optim / ranks),
        (params / ranks, grads / ranks, optim / ranks),
    ]
    assert list(model_states(0, ranks, precision, states)) == ["params", "grads", "optim"]


def failure(category: str, request: int, limit: int, **live: int) -> MemoryLimitError:
    held = dict.fromkeys(("params", "grads", "optim", "activations", "buffers"), 0) | live
    assert sum(held.values()) + request > limit
    return MemoryLimitError("no", live=held, category=category, request=request, limit=limit)


def advised(error: MemoryLimitError, *, stage: int = 0, ranks: int = 4, microbatch: int = 0) -> str:
    """The advice for a model of a million parameters in fp32 with Adam."""
    return advice(
        error, params=10**6, stage=stage, ranks=ranks, precision="fp32", states=2,
        microbatch=microbatch,
    )  # fmt: skip


def test_higher_stages_that_fit_are_named_with_what_they_need() -> None:
    """Four ranks: 16, 10, 7, 4 MB; beside 0.5 MB of activations, 0.1 of buffers, 0.4 asked for."""
    error = failure("buffers", 400_000, 8_000_000, params=4_000_000, grads=3_500_000,
                    activations=500_000, buffers=100_000)  # fmt: skip
    assert advised(error) == (
        "what would fit:\n"
        "  zero.stage=2: needs at least 8,000,000 bytes a rank\n"
        "  zero.stage=3: needs at least 5,000,000 bytes a rank"
    )
    assert advised(error, stage=2) == (
        "what would fit:\n  zero.stage=3: needs at least 5,000,000 bytes a rank"
    )


def test_a_state_that_was_asked_for_is_in_the_formula_already() -> None:
    error = failure("optim", 8_000_000, 10_000_000, params=4_000_000, grads=4_000_000)
    assert "zero.stage=1: needs at least 10,000,000 bytes" in advised(error)


def test_a_smaller_microbatch_is_at_most_what_its_share_of_activations_leaves_room_for() -> None:
    """8 samples hold 900 kB and ask for 100: 125 each, at least. 650 kB are left for them."""
    error = failure("activations", 100_000, 16_650_000, params=4_000_000, grads=4_000_000,
                    optim=8_000_000, activations=900_000)  # fmt: skip
    said = advised(error, ranks=1, microbatch=8)
    assert said == "what would fit:\n  train.microbatch=5, at most: 8 samples were under way"
    assert "train.microbatch" not in advised(error, microbatch=0)


def test_what_was_asked_for_beside_activations_takes_their_room() -> None:
    error = failure("buffers", 300_000, 1_000_000, activations=800_000)
    assert "train.microbatch=7, at most" in advised(error, ranks=1, microbatch=8)


@pytest.mark.parametrize("category", ["grads", "activations"])
def test_where_nothing_fits_that_is_said_in_one_line(category: str) -> None:
    """One sample asks for more than there is, or the states alone do; one rank has no stages."""
    error = failure(category, 4_000_000, 5_000_000, params=4_900_000)
    said = advised(error, ranks=1, microbatch=1)
    assert "\n" not in said and "more ranks" in said and "device.memory_limit" in said
