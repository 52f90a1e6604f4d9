"""The benchmark of convolutions measures the same computation as its peer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hpcml.bench import conv
from hpcml.cli import main
from hpcml.comm import launch

TINY = (conv.Shape(3, 5, 3, 2, 7), conv.Shape(16, 16, 3, 1, 5))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SHAPES", TINY)
    monkeypatch.setattr(conv, "STEP", (8, 3, 16, 16))


def test_the_peer_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["bench", "conv", "--rounds", "1", "--peer", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bench"], report["part"], report["batch"]) == ("conv", "shapes", conv.BATCH)
    asked = [(row["shape"], row["pass"]) for row in report["rows"]]
    assert asked == [(str(shape), name) for shape in TINY for name in conv.PASSES]
    for row in report["rows"]:
        who = ["ours"] if row["shape"] == str(TINY[0]) else ["ours", "winograd"]
        assert list(row["difference"]) == list(row["ratio"]) == who
        assert 0 <= max(row["difference"].values()) < 1e-5 and min(row["ratio"].values()) > 0
    for who in conv.OURS:
        ratios = [row["ratio"].get(who, row["ratio"]["ours"]) for row in report["rows"]]
        assert min(ratios) <= report["means"][who]["all"] <= max(ratios)
    text = conv.table(report).splitlines()
    assert len(text) == 3 + len(TINY) + 2 and text[-2].startswith("geometric mean")


def test_multiplications_and_additions() -> None:
    shape = conv.Shape(64, 128, 3, 2, 56)
    assert (shape.out, str(shape)) == (28, "64-128 3x3/2 56")
    assert shape.flops == 2 * 16 * 28 * 28 * 128 * 64 * 9


def test_a_step_of_the_same_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    arguments = ["bench", "conv", "--part", "step", "--rounds", "1", "--peer", "torch"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    # Of three steps of such a learning rate, which magnify rounding by how the weights begin.
    assert max(row["loss_difference"].values()) < 2e-3
    assert min(row["ratio"].values()) > 0
    assert "ratio" in conv.table(report)


def test_without_a_peer_a_table_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "conv", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert str(TINY[0]) in out and "geometric mean" not in out
    assert main(["bench", "conv", "--peer", "jax"]) == 2
    assert '--peer="jax" is unknown: use torch' in capsys.readouterr().err


def test_shapes_are_for_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "conv", "--ranks", "0"]) == 2
    assert "--ranks 0: communication needs 2 ranks or more" in capsys.readouterr().err
    two = replace(launch.read(), size=2)
    monkeypatch.setattr(launch, "read", lambda: two)
    assert main(["bench", "conv"]) == 2
    assert "--part shapes measures 1 rank, not 2: add --part step" in capsys.readouterr().err
