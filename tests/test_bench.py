"""The benchmark of the step measures what it says: the same computation as the peer's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcml import backend
from hpcml.bench import products, step, step_show
from hpcml.cli import bench_step, main
from hpcml.comm import Mesh

TINY = step.Size(1, 2, 16, 8, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.SIZES, "small", TINY)


def test_products_are_those_of_the_model() -> None:
    model = step.our_step(TINY).model
    weights = sorted(p.shape for p in model.parameters() if p.ndim == 2)
    rows, shapes = TINY.batch * TINY.block, products.shapes(TINY, step.VOCAB)
    found = [(n_out, n_in) for r, n_in, n_out, n in shapes for _ in range(n)]
    assert sorted([*found, (TINY.block, TINY.width)]) == weights  # and the table of positions
    assert all(r == rows for r, *_ in shapes)


def test_products_take_turns_by_layer_as_often_as_they_occur() -> None:
    made: list[str] = []
    products.alternating([(lambda: made.append("a"), 3), (lambda: made.append("b"), 1)])()
    assert made == ["a", "b", "a", "a"]
    products.ours(products.shapes(TINY, step.VOCAB))()


def test_the_peer_computes_the_same_step(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    arguments = ["--sizes", "small", "--rounds", "2", "--peer", "torch", "--json"]
    assert main(["bench", "step", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["part"], report["ranks"]) == (3, "time", 1)
    assert report["gemm"] and report["blas"] and report["packages"]["torch"] == torch.__version__
    (row,) = report["rows"]
    assert row["loss_difference"] < 1e-5, "of several steps"
    assert all(row[name] > 0 for name in ("ours", "peer", "gemm_ours", "gemm_peer"))
    assert row["ratio"] > 0 < row["gemm_ratio"] and "compiled" not in row


def test_bfloat16_beside_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    arguments = ["--sizes", "small", "--rounds", "1", "--peer", "torch", "--precision", "bf16"]
    assert main(["bench", "step", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "bf16"
    assert 1e-6 < report["rows"][0]["loss_difference"] < 0.1, "two roundings of the same step"
    assert main(["bench", "step", "--precision", "bf16", "--part", "memory"]) == 2
    assert "--precision bf16" in capsys.readouterr().err


def test_losses_that_differ_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_peer = pytest.importorskip("hpcml.bench.torch_peer")
    monkeypatch.setitem(torch_peer.ADAMW, "lr", 2e-3)
    assert step.measure(TINY, "torch", rounds=1)["loss_difference"] > 1e-4


def test_what_does_not_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def fail(model: Any) -> Any:
        raise RuntimeError("\n  no compiler\nmany more lines")

    monkeypatch.setattr(torch, "compile", fail)
    report = step.run(["small"], "torch", rounds=1, compiled=True)
    (row,) = report["rows"]
    assert row["not_built"] == "no compiler" and row["ratio"] > 0
    text = step_show.table(report)
    assert "not built" in text and text.endswith("torch.compile: not built: no compiler")


def test_what_compiles_is_one_more_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    report = step.run(["small"], "torch", rounds=1, compiled=True)
    (row,) = report["rows"]
    assert row["compiled"] > 0 < row["compiled_ratio"] and row["loss_difference"] < 1e-5
    assert "compiled ms  ratio" in step_show.table(report)


def test_without_a_peer_a_table_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--sizes", "small", "--rounds", "2", "--threads", "2"]) == 0
    backend.set_threads(1)
    title, _, heads, row = capsys.readouterr().out.splitlines()
    assert "2 threads" in title and "ratio" not in heads and str(TINY) in row


def test_the_command_line_knows_the_sizes() -> None:
    assert tuple(step.SIZES) == bench_step.SIZES


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--peer", "jax"], '--peer="jax" is unknown: use torch'),
        (["--threads", "0"], "--threads 0: give a rank at least 1"),
        (["--compile"], "--compile is timed beside --peer torch on 1 rank"),
        (["--ranks", "0"], "--ranks 0: communication needs 2 ranks or more"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hpcml: error: {complaint}")


def test_weights_come_from_every_parameter() -> None:
    made = step.our_step(TINY, mesh=Mesh())
    weights = step.weights_of(made)
    assert weights.keys() == dict(made.model.named_parameters()).keys()
    assert not any(
        w is p.data for w, p in zip(weights.values(), made.model.parameters(), strict=True)
    )
