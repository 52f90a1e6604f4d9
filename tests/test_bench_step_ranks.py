"""The benchmark of the step in every layout: complete, and the same computation as the peer's."""

from __future__ import annotations

from typing import Any

import pytest

import hpcml
from hpcml.bench import step, step_ranks, step_show
from hpcml.comm import Mesh
from hpcml.comm.guard import agree
from tests.train.jobs import hpcml as command

TINY = step.Size(2, 2, 16, 8, 2)
LAYOUTS = [*(f"stage {stage}" for stage in range(4)), "stage 0", "local, period 8",
           "4 microbatches"]  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.SIZES, "small", TINY)


def check(report: dict[str, Any]) -> None:
    assert (report["bench"], report["version"], report["part"]) == ("step", 3, "time")
    assert [row["layout"] for row in report["rows"]] == LAYOUTS
    for row in report["rows"]:
        assert row["size"] == str(TINY) and row["ours"] > 0
        assert ("per_sample" in row) == (row in report["rows"][4:])


def test_every_layout_without_a_peer() -> None:
    reports = hpcml.run(lambda: step_ranks.run(Mesh(), ["small"], rounds=2), ranks=2)
    for report in reports:
        check(report)
        assert report["ranks"] == 2 and "beside" not in report["rows"][0]
        assert report["rows"][4]["per_sample"] == 1
    text = step_show.table(reports[0])
    assert text.count("stage 0") == 3 and "torch" not in text  # two rows and a heading


def test_started_alone_it_starts_a_job() -> None:
    arguments = ["--ranks", "2", "--part", "memory", "--sizes", "small"]
    done = command("bench", "step", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert "--part memory measures 1 rank, not 2: leave out --ranks" in done.stderr


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_peer = pytest.importorskip("hpcml.bench.torch_peer")

    def fail(*_: Any) -> Any:
        raise NotImplementedError("gloo has no such call\nand more")

    monkeypatch.setattr(torch_peer, "step_among_ranks", fail)
    (row, other) = hpcml.run(lambda: step_ranks._stage(Mesh(), TINY, 2, "torch", 1, 0), ranks=2)
    assert row["cannot_run"] == other["cannot_run"] == "gloo has no such call"
    assert "ratio" not in row and row["ours"] > 0
    about = {"part": "time", "peer": "torch", "ranks": 2, "threads": 1,
             "precision": "fp32", "cpu": "zen", "gemm": "mkl",
             "blas": [], "packages": {"torch": "2"}}  # fmt: skip
    text = step_show.table({**about, "rows": [row]})
    assert text.endswith("cannot run: gloo has no such call")


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_peer_computes_the_same_step_in_every_layout() -> None:
    mesh = Mesh()
    pytest.importorskip("torch")
    report = step_ranks.run(mesh, ["small"], "torch", rounds=1)
    check(report)
    stages = report["rows"][:4]
    for row in stages:
        assert "cannot_run" not in row, row
        assert row["loss_difference"] < 1e-5 and row["peer"] > 0 < row["ratio"]
    assert [row["beside"].split(",")[0] for row in stages] == [
        "DistributedDataParallel", "ZeroRedundancyOptimizer", "fully_shard", "fully_shard"
    ]  # fmt: skip
    assert agree(mesh.world, lambda: step_show.table(report).count("fully_shard")) == 2
