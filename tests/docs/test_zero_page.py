"""The page about ZeRO: its example runs as it stands, and its figures are those of the formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpcml.parallel.states import STAGES, model_states
from tests.comm.jobs import ROOT, printed

PAGE = (ROOT / "docs" / "zero.md").read_text(encoding="utf-8")


def example(ranks: int, folder: Path) -> str:
    """What the example prints."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line.strip()]) <= 28
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    return printed(script, ranks, timeout=100)


def test_the_example(tmp_path: Path) -> None:
    ranks = 3
    text = example(ranks, tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]
    assert len(losses) == 2 and losses[1] < 0.5 * losses[0]
    held = {kind: float(n) for kind, n in re.findall(r"(\w+): (\S+) bytes a parameter", text)}
    assert held == pytest.approx(model_states(3, ranks, "bf16"), rel=0.02, abs=0.01)
    assert re.search(r"^\d+ parameters, \d+ values$", text, re.MULTILINE)


def test_the_table_of_stages() -> None:
    rows = re.findall(r"^\| (\d) \| [^|]+ \| ([^|]+) \| ([^|]+) \| . Ψ \|$", PAGE, re.MULTILINE)
    assert [int(stage) for stage, *_ in rows] == list(STAGES)
    for ranks in (1, 2, 64):
        for stage, half, single in rows:
            for text, precision in ((half, "bf16"), (single, "fp32")):
                parts = [part.strip().split("/") for part in text.split("+")]
                value = sum(float(p[0]) / (ranks if len(p) > 1 else 1) for p in parts)
                assert value == sum(model_states(int(stage), ranks, precision).values())
