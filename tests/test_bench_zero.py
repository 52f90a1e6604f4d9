"""The benchmark of ZeRO: complete, measured, and the paper's formulas beside."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hpcml
from hpcml.bench import zero, zero_limits, zero_show
from hpcml.bench.step import Size
from hpcml.cli import main
from hpcml.comm import Mesh
from tests.train.jobs import hpcml as command

Report = dict[str, Any]


def measured(*parts: str, ranks: int = 2, layers: int = 1, width: int = 64) -> Report:
    """The report of ranks that are threads: memory and traffic are those of processes."""
    return hpcml.run(lambda: zero.run(Mesh(), parts, layers, width, 2), ranks=ranks)[0]


def test_states_and_traffic_of_every_case() -> None:
    report = measured("states", layers=3, width=192)
    assert (report["bench"], report["version"], report["width"]) == ("zero", 1, 192)
    assert report["cpu"] and report["packages"]["numpy"] and "models" not in report
    cases = {
        (r["precision"], r["stage"], r["split"], r["microbatches"]): r for r in report["states"]
    }
    both = {(t, s, "blocks", a) for t in ("fp32", "bf16") for s in range(4) for a in (1, 4)}
    assert set(cases) == both | {("fp32", s, "layers", a) for s in (1, 2, 3) for a in (1, 4)}
    assert len(cases) == len(report["states"])
    for precision, stage, _, microbatches in both:
        row = cases[precision, stage, "blocks", microbatches]
        assert row["ranks"] == 2 and row["params"] > 1_000_000
        # Measured: beside what the formula counts there is some padding.
        for kind, formula in row["formula"].items():
            assert formula <= row["states"][kind] < 1.01 * formula
        assert zero.moved(row) == pytest.approx(row["payload_formula"], rel=0.05)
        # What a block or two of three leave of the model for a moment, in units that are blocks.
        held = max(0, stage - 1) * row["unit"]
        scratch = (2 << 20) + (160 << 10)  # of a long sum in 16 bits, whatever is added up
        assert held <= row["buffers"] <= held + max(row["unit"], scratch)
        if precision == "fp32" and stage >= 2:
            # And what these messages need: two quarters of the half that comes, and for sums.
            beside = row["buffers"] - held - row["unit"] / 4
            assert 0 <= beside <= 2 << 16
        itemsize = {"fp32": 4, "bf16": 2}[precision]
        assert row["bucket"] == row["unit"] >= 12 * 192**2 * itemsize
    assert [cases["fp32", s, "blocks", 4]["payload_formula"] for s in range(4)] == [2, 2, 5, 12]
    naive = cases["fp32", 3, "layers", 1]
    assert set(naive["payload"]) >= {"broadcast", "reduce"}
    # One of two ranks owns two of three blocks, and all else.
    assert sum(naive["states"].values()) == pytest.approx(16 * 2 / 3, rel=0.02)


def test_one_rank_moves_nothing() -> None:
    for row in measured("states", ranks=1)["states"]:
        assert zero.moved(row) == row["payload_formula"] == row["sent"] == 0
        assert sum(row["states"].values()) == pytest.approx(16, rel=0.05)


def test_times_where_every_rank_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "TIMED_BLOCK", 8)
    monkeypatch.setattr(zero_limits, "cores", lambda mesh: 2)
    report = measured("time")
    rows = report["time"]
    ways = [row["way"] for row in rows]
    assert ways == [
        *(f"stage {stage}" for stage in range(4)), "stage 3, layers", "deterministic",
        "2 microbatches", "2 microbatches, deterministic", "alone",
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 < row["ratio"] for row in rows)
    assert "times stage 0" in zero_show.table(report)
    assert measured("time", ranks=3)["time"] == []


def test_the_largest_model_fits_and_a_larger_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 3_000_000
    monkeypatch.setattr(zero_limits, "MODEL_BUDGET", budget)
    rows = measured("models")["models"]
    assert [(row["ranks"], row["stage"]) for row in rows] == [(2, stage) for stage in range(4)]
    assert [row["formula"] for row in rows] == [budget / n for n in (16, 10, 9, 8)]
    for row in rows:
        size = Size(row["layers"], 1, row["width"], zero_limits.MODEL.block, 1)
        more = Size(row["layers"] + 1, 1, row["width"], zero_limits.MODEL.block, 1)
        assert zero_limits.fits(size, row["stage"], "bf16", budget, 2)
        assert not zero_limits.fits(more, row["stage"], "bf16", budget, 2)
        assert 0.5 * row["formula"] < row["params"] <= row["formula"]
    layers = [row["layers"] for row in rows]
    assert layers == sorted(layers) and layers[0] < layers[3]


def test_parameters_of_the_models_are_counted_right() -> None:
    model = zero.our_step(Size(3, 1, 64, zero_limits.MODEL.block, 1), mesh=Mesh()).model
    assert zero_limits._params(3) == sum(p.numel() for p in model.parameters())


def test_more_ranks_have_room_for_larger_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_limits, "BATCHED", Size(2, 2, 64, 16, 0))
    monkeypatch.setattr(zero_limits, "BATCH_BUDGET", 2_500_000)
    rows = measured("batches")["batches"]
    assert [(row["ranks"], row["stage"]) for row in rows] == [(2, 2), (2, 3)]
    for row in rows:
        assert 0 < row["alone"] < row["microbatch"]
        assert row["samples_per_second"] > 0 < row["alone_samples_per_second"]
    nothing = hpcml.run(lambda: zero_limits._speeds(Mesh(), 3, (0, 0), 2), ranks=2)
    assert nothing == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("most", [1, 5, 8, 100])
@pytest.mark.parametrize("bound", [0, 1, 4, 5, 7, 8, 63])
def test_the_search_finds_the_bound(bound: int, most: int) -> None:
    tried: list[int] = []

    def good(number: int) -> bool:
        tried.append(number)
        return number <= bound

    assert zero_limits._largest(Mesh(), good, most) == min(bound, most)
    assert min(tried) >= 1 and max(tried) <= most and len(set(tried)) == len(tried)


def test_jobs_of_several_sizes_are_one_report(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "1", "2", "--part", "states", "--width", "64", "--layers", "1"]
    done = command("bench", "zero", "--json", "--rounds", "2", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["ranks"] for row in report["states"]] == [1] * 16 + [2] * 22
    text = zero_show.table(report)
    assert "Bytes a parameter" in text and "Elements a parameter" in text
    assert main(["bench", "zero", "--ranks", "0"]) == 2
    assert capsys.readouterr().err == "hpcml: error: --ranks 0: start at least 1\n"


def test_tables_of_what_fits() -> None:
    models = {"ranks": 4, "stage": 3, "precision": "bf16", "budget": 6e6, "layers": 9, "width": 64,
              "params": 750_000, "formula": 1.5e6}  # fmt: skip
    batches = {"ranks": 4, "stage": 2, "budget": 16e6, "cores": 2, "microbatch": 8, "alone": 2,
               "samples_per_second": 30.0, "alone_samples_per_second": 20.0}  # fmt: skip
    none = {**batches, "alone": 0, "alone_samples_per_second": 0.0}
    text = zero_show.table({"cpu": "zen", "models": [models], "batches": [batches, none]})
    assert [line.split()[-1] for line in text.splitlines() if line.lstrip().startswith("4 ")] == [
        "50%", "1.50", "-"
    ]  # fmt: skip
