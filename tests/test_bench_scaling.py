"""The benchmark of scaling: its arithmetic, its jobs, and the balance that it reports."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import hpcml
from hpcml import backend
from hpcml.bench import scaling, scaling_job, scaling_show
from hpcml.bench.step import VOCAB, Size, batch_of, our_step
from hpcml.cli import bench_jobs, main
from hpcml.comm import Mesh
from hpcml.errors import UserError

TINY = Size(2, 1, 16, 8, 4)
Done = subprocess.CompletedProcess[str]


def kind(seconds: float, compute: list[float], memory: list[int]) -> dict[str, Any]:
    return {"seconds": seconds, "compute": compute, "memory": memory}


def test_efficiency_is_that_of_the_round_and_utilisation_that_of_the_cores() -> None:
    alone = [{"strong": kind(8.0, [7], [100])}, {"strong": kind(4.0, [3], [100])},
             {"strong": kind(6.0, [5], [100])}]  # fmt: skip
    found = [{"strong": kind(4.0, [2, 4], [60, 40])}, {"strong": kind(2.5, [2, 2], [60, 40])},
             {"strong": kind(6.0, [1, 2], [60, 40])}]  # fmt: skip
    row = scaling.row(TINY, "strong", (2, 1), found, alone, peak=1e6)
    assert row["seconds"] == {"median": 4.0, "min": 2.5, "max": 6.0}
    assert row["speedup"] == {"median": 1.6, "min": 1.0, "max": 2.0}
    assert row["efficiency"] == {"median": 0.8, "min": 0.5, "max": 1.0}
    assert row["compute_balance"] == pytest.approx({"median": 4 / 3, "min": 1, "max": 4 / 3})
    assert (row["memory"], row["memory_balance"]) == (60, 1.2)
    assert row["batch"] == 4 and row["samples_per_second"] == 1.0
    flops = scaling.flops_per_token(TINY) * 32
    assert row["utilisation"]["max"] == pytest.approx(flops / 2.5e6)


def test_weak_scaling_counts_samples() -> None:
    results = [{"weak": kind(2.0, [1, 1], [1, 1])}]
    row = scaling.row(TINY, "weak", (2, 2), results, [{"weak": kind(2.0, [1], [1])}], 1.0)
    assert row["batch"] == 8 and row["speedup"]["median"] == 2
    assert row["efficiency"]["median"] == 0.5  # twice the samples by four threads


def test_the_operations_of_a_token() -> None:
    model = our_step(TINY).model
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    multiplied -= TINY.block * TINY.width  # the table of positions
    assert multiplied == 2 * 12 * 16**2 + VOCAB * 16
    assert scaling.flops_per_token(TINY) == 6 * multiplied + 12 * 2 * 16 * 8


def test_a_job_reports_every_rank_and_restores_the_step() -> None:
    reports = hpcml.run(lambda: scaling_job.run(Mesh(), TINY), ranks=2)
    for report in reports:
        assert set(report) == {"strong", "weak"}
        for found in report.values():
            assert len(found["compute"]) == len(found["memory"]) == 2
            assert max(found["compute"]) > 0 and min(found["memory"]) > 0 and found["seconds"] > 0
    assert reports[0] == reports[1]  # the slowest rank counts for all
    (alone,) = hpcml.run(lambda: scaling_job.run(Mesh(), TINY), ranks=1)
    assert alone["strong"] == alone["weak"]

    step, batch = our_step(TINY), batch_of(TINY)
    before = set(vars(step.zero))
    with scaling_job.clocked(step) as seconds:
        step(batch)
        step(batch)
    assert len(seconds) == 2 and min(seconds) > 0
    assert set(vars(step.zero)) == before


def test_weak_scaling_gives_a_rank_as_much_as_one_alone_has() -> None:
    def memory(ranks: int) -> list[int]:
        size = scaling.of_kind(TINY, "weak", ranks)
        found: list[int] = hpcml.run(lambda: scaling_job.measure(Mesh(), size), ranks=ranks)[0][
            "memory"
        ]
        return found

    (alone,) = memory(1)
    assert memory(2) == pytest.approx([alone, alone], rel=0.02)


def test_combinations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int, bool]] = []

    def job(ranks: int, args: list[str], *, env: dict[str, str], **how: Any) -> Done:
        assert args[:6] == ["-m", "hpcml", "bench", "scaling", "--json", "--job"]
        spec = json.loads(args[6])
        assert env["OMP_NUM_THREADS"] == str(spec["threads"])
        started.append((ranks, spec["threads"], "size" in spec))
        workers = ranks * spec["threads"]
        if "size" not in spec:
            found: dict[str, Any] = {"gemm": [1e9 + len(started)] * ranks}
        else:
            assert spec["size"] == asdict(TINY)
            one = kind(1 / workers, [1.0] * ranks, [10] * ranks)
            found = {"strong": one, "weak": {**one, "seconds": ranks / workers}}
        return subprocess.CompletedProcess(args, 0, stdout=json.dumps(found))

    monkeypatch.setattr(backend, "cores", lambda: [0, 1, 2])
    report = scaling.run(TINY, [2], [1, 2], 2, job)
    once = [(1, 1, False), (2, 1, False), (1, 1, True), (2, 1, True)]
    assert started == once * 2  # 2 x 2 has too few cores
    assert report["left_out"] == [(2, 2)] and report["cores"] == 3
    assert report["peak"][1] == {"cores": 2, "flops_per_second": 2 * (1e9 + 6)}  # of the best round
    assert [(r["kind"], r["ranks"], r["threads"]) for r in report["rows"]] == [
        ("strong", 1, 1), ("strong", 2, 1), ("weak", 1, 1), ("weak", 2, 1)
    ]  # fmt: skip
    assert all(r["efficiency"]["min"] == r["efficiency"]["max"] == 1 for r in report["rows"])
    text = scaling_show.table(report)
    assert "left out: 2 x 2 threads on 3 core(s)" in text and text.count("weak") == 2


def test_real_jobs_and_a_plot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(backend, "cores", lambda: [0, 1])
    monkeypatch.setattr(scaling, "PRODUCTS", (64,))
    arguments = ["--ranks", "2", "--threads", "1", "--width", "16", "--layers", "1", "--block", "8",
                 "--batch", "2", "--rounds", "1", "--plot", str(tmp_path / "p.png")]  # fmt: skip
    assert main(["bench", "scaling", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bench"], report["version"]) == ("scaling", 1) and len(report["rows"]) == 4
    assert [peak["cores"] for peak in report["peak"]] == [1, 2]
    for row in report["rows"]:
        assert row["compute_balance"]["min"] >= 1 and row["utilisation"]["median"] > 0
        assert row["efficiency"]["median"] * row["ranks"] == row["speedup"]["median"]
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--batch", "1"], "--batch 1: 2 ranks need a sample each"),
        (["--width", "200"], "--width 200: take a multiple of 3"),
        (["--plot", "none/there.png"], "none/there.png cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "scaling", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hpcml: error: {said}") and error.count("\n") == 1


def test_no_jobs_within_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        bench_jobs.job(1, ["-c", ""])
