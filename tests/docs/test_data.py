"""The example of docs/data.md as it stands there, on any number of ranks and in every mode."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.comm.jobs import ROOT, printed

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
CHOICE = 'mode="local", period=4, sync_steps=50'


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1 and blocks[0].count(CHOICE) == 1
    return str(blocks[0])


@pytest.mark.parametrize(
    ("ranks", "choice"),
    [(0, CHOICE), (3, CHOICE), (2, 'mode="async", staleness=1'),
     (2, 'mode="async", elastic=0.1, period=2, staleness=1')],
)  # fmt: skip
def test_it_learns_the_wave(tmp_path: Path, ranks: int, choice: str) -> None:
    script = tmp_path / "example.py"
    script.write_text(example().replace(CHOICE, choice))
    text = printed(script, ranks)
    said = re.fullmatch(r"mean squared error (\d\.\d{5})\n", text)
    assert said, text
    assert float(said[1]) < 0.05  # 0.5 for a constant


def test_it_is_about_20_lines() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert 15 <= len(lines) <= 25
