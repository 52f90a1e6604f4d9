"""The example of docs/tensor.md as it stands there, alone and on ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.comm.jobs import ROOT, printed

PAGE = (ROOT / "docs" / "tensor.md").read_text(encoding="utf-8")
VALUES = {0: 65 * 32 * 2 + 2 * 32 * 101 + 101 + 32, 3: 22 * 32 * 2 + 2 * 32 * 34 + 34 + 32}


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return str(block)


def said(folder: Path, ranks: int) -> tuple[float, int]:
    """The loss and the number of values that the example ends with."""
    script = folder / "example.py"
    script.write_text(example())
    text = printed(script, ranks)
    found = re.fullmatch(r"loss (\d\.\d{4}), (\d+) values on this rank\n", text)
    assert found, text
    return float(found[1]), int(found[2])


def test_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    alone, whole = said(tmp_path, 0)
    loss, held = said(tmp_path, 3)  # that divides no dim of the model
    assert alone < 0.2 and loss == pytest.approx(alone, abs=2e-3)
    assert (whole, held) == (VALUES[0], VALUES[3])
