"""The script of the documentation: short, and equal losses on any number of ranks."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.comm.jobs import ROOT, printed

SCRIPT = ROOT / "docs" / "own_model.py"


@cache
def losses(ranks: int) -> dict[int, float]:
    """Losses that the script prints, by step; without a launcher for 0 ranks."""
    text = printed(SCRIPT, ranks)
    found = [re.fullmatch(r"step (\d+)  loss (\d+\.\d+)", line) for line in text.splitlines()]
    assert all(found), text
    return {int(match[1]): float(match[2]) for match in found if match}


def test_it_learns() -> None:
    alone = losses(0)
    assert list(alone) == [40, 80, 120, 160, 200]
    assert alone[200] < 0.1 * alone[40]


def test_losses_do_not_depend_on_the_ranks() -> None:
    assert losses(3) == pytest.approx(losses(0), rel=1e-4, abs=2e-6)


def test_it_is_about_30_lines() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert docstring.end_lineno is not None
    lines = source.splitlines()[docstring.end_lineno :]
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert 25 <= len(code) <= 40
