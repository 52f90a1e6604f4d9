"""The benchmark of the step measures what it says: the same computation as the peer's."""

from __future__ import annotations

import json

import pytest

from hpcml.bench import step
from hpcml.cli import main

TINY = step.Size(1, 2, 16, 8, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SIZES", (TINY,))
    monkeypatch.setattr(step, "rounds_for", lambda size: 2)


def test_products_are_those_of_the_model() -> None:
    model = step.our_step(TINY).model
    weights = sorted(p.shape for p in model.parameters() if p.ndim == 2)
    rows = TINY.batch * TINY.block
    shapes = [(n_out, n_in) for r, n_in, n_out, n in step.products(TINY) for _ in range(n)]
    assert sorted([*shapes, (TINY.block, TINY.width)]) == weights  # and the table of positions
    assert all(r == rows for r, *_ in step.products(TINY))
    assert len(step.our_products(TINY)) == 3 * len(step.products(TINY))


def test_the_peer_computes_the_same_step(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["bench", "step", "--peer", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert row["loss_difference"] < 1e-6
    assert row["ratio"] == row["peer"] / row["ours"]
    assert 0 < row["gemm_ours"] < row["ours"] and report["gemm"] and report["blas"]


def test_without_a_peer_a_table_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step"]) == 0
    title, heads, row = capsys.readouterr().out.splitlines()
    assert "1 thread" in title and "ratio" not in heads and str(TINY) in row


def test_an_unknown_peer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--peer", "jax"]) == 2
    assert capsys.readouterr().err == 'hpcml: error: --peer="jax" is unknown: use torch\n'
