"""The table at the end of a run: bytes by category beside the formula."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from hpcml import memory
from hpcml.comm import Mesh
from hpcml.comm.threads import run
from hpcml.train.usage import memory_record, memory_table


def record(**most: int) -> dict[str, dict[str, float]]:
    return {name: {"min": 0, "mean": 0, "max": n, "max_rank": r}
            for r, (name, n) in enumerate(most.items())}  # fmt: skip


def test_the_table_shows_each_category_beside_the_formula() -> None:
    """1000 parameters in bf16 on four ranks at stage 2: 2, 2/4 and 12/4 bytes for each."""
    used = record(params=2000, grads=510, optim=2970, activations_peak=12345, buffers=0,
                  total=5480, total_peak=20000)  # fmt: skip
    assert memory_table(
        used, params=1000, trainable=1000, stage=2, ranks=4, precision="bf16", states=2
    ) == (
        "where did all the memory go   bytes  per parameter  formula  difference  rank\n"
        "  params                      2,000           2.00     2.00      +0.0 %     0\n"
        "  grads                         510           0.51     0.50      +2.0 %     1\n"
        "  optim                       2,970           2.97     3.00      -1.0 %     2\n"
        "  activations (peak)         12,345          12.35                          3\n"
        "  buffers (peak)                  0           0.00                          4\n"
        "  total                       5,480           5.48                          5\n"
        "  total (peak)               20,000          20.00                          6\n"
        "  formula: bf16, 2 state(s) of the optimizer, zero.stage=2, 4 rank(s)"
    )


def test_frozen_parameters_have_no_gradient_and_no_state_by_the_formula() -> None:
    used = record(params=400, grads=160, optim=320)
    text = memory_table(
        used, params=100, trainable=40, stage=0, ranks=2, precision="fp32", states=2
    )
    rows = [line.split() for line in text.splitlines()[1:4]]
    assert [row[3:5] for row in rows] == [["4.00", "+0.0"], ["1.60", "+0.0"], ["3.20", "+0.0"]]


def test_an_optimizer_without_states_is_beside_nothing() -> None:
    text = memory_table(
        record(optim=0), params=10, trainable=10, stage=0, ranks=1, precision="fp32", states=0
    )
    assert text.splitlines()[1].split() == ["optim", "0", "0.00", "0"]


def test_the_record_has_the_rank_with_most_and_the_peaks() -> None:
    def rank() -> dict[str, dict[str, float]]:
        axis = Mesh()["dp"]
        sizes = (300, 500, 400)
        kept = memory.empty((sizes[axis.rank],), np.uint8, "grads")
        passing = memory.empty((1000,), np.uint8, "activations")
        del passing
        other = memory.empty((7,), np.uint8, "buffers")
        found = memory_record(axis)
        del kept, other
        return found

    gc.collect()
    for found in run(rank, ranks=3):
        assert found["grads"] == {"min": 300, "mean": 400, "max": 500, "max_rank": 1}
        assert found["activations_peak"]["max"] == 1000
        assert found["total"]["max"] == 507 and found["total_peak"]["max"] == 1500
        assert list(found) == ["params", "grads", "optim", "activations_peak", "buffers", "total",
                               "total_peak"]  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_formula_is_that_of_the_stage(stage: int) -> None:
    text = memory_table(
        record(params=1, grads=1, optim=1), params=1, trainable=1, stage=stage, ranks=2,
        precision="fp32", states=2,
    )  # fmt: skip
    formula = [float(line.split()[3]) for line in text.splitlines()[1:4]]
    assert formula == [[4, 4, 8], [4, 4, 4], [4, 2, 4], [2, 2, 4]][stage]
