"""The benchmark of one model divided in every way: complete, and its bytes those of the papers."""

from __future__ import annotations

import pytest

import hpcml
from hpcml.bench import step, step_show, step_tensor
from hpcml.comm import Mesh
from tests.train.jobs import hpcml as command

TINY = step.Size(2, 3, 24, 16, 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_way(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setitem(step.SIZES, "small", TINY)
    report = hpcml.run(lambda: step_tensor.run(Mesh(), ["small"], rounds=2), ranks=ranks)[0]
    rows = {row["layout"]: row for row in report["rows"]}
    assert list(rows) == list(step_tensor.WAYS) and report["part"] == "tensor"
    divisible = {name for name in rows if name.startswith("tp")} if ranks == 2 else set()
    for name, row in rows.items():
        if name in divisible:  # three heads on two ranks
            assert row["cannot_run"] == "3 heads on 2 ranks"
            continue
        assert row["ours"] > 0 and row["ratio"] > 0 and row["sent"] > 0
    text = step_show.table(report)
    assert ("cannot run: 3 heads" in text) == (ranks == 2) and "tp, sequence, parts" in text
    if ranks == 3:
        assert rows["tp"]["sent"] < rows["tp, naive"]["sent"]
        assert rows["tp"]["held"] < rows["dp"]["held"] == rows["cp"]["held"]
        assert rows["tp, naive"]["activations"] > 2 * rows["tp"]["activations"] > 0


def test_it_needs_ranks() -> None:
    done = command("bench", "step", "--part", "tensor")
    assert done.returncode == 2 and "--part tensor divides a model among ranks" in done.stderr
