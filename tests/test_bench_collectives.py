"""The benchmarks of communication: what they report is complete, consistent and checked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.bench import collectives, halo, rounds
from hpcml.cli import main
from hpcml.comm import Axis, choice
from hpcml.comm.algorithms import OPERATIONS, Situation
from hpcml.comm.algorithms.choosing import fitting
from tests.comm.jobs import python
from tests.train.jobs import hpcml as command

TWO = Situation(nodes=(0, 0), vendor=True, shared=True)
TINY = ("--rounds", "2", "--min", "16K", "--max", "16K")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `hpcml bench` as from a shell, whatever these tests run under."""
    return command("bench", *arguments, timeout=100)


def report(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_rows(found: dict[str, Any]) -> None:
    """Bandwidths follow from times, and times are times."""
    p = found["ranks"]
    best = max(found["memory_bandwidth"].values())
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["ratio"] > 0
        assert row["algbw"] == pytest.approx(row["bytes"] / row["seconds"])
        factor = collectives.BUS_FACTORS[row["operation"]](p)
        assert row["busbw"] == pytest.approx(factor * row["algbw"])
        traffic = collectives.TRAFFIC[row["operation"]](p) * row["bytes"]
        assert row["memory_share"] == pytest.approx(traffic / row["seconds"] / best)
        assert row["algorithm"] != "MPI" or row["ratio"] == 1


def test_all_operations_and_algorithms_are_measured() -> None:
    found = report("collectives", "--ranks", "2", *TINY)
    assert (found["bench"], found["version"]) == ("collectives", 1)
    assert (found["ranks"], found["nodes"], found["place"]) == (2, 1, "node")
    assert found["mpi"] and found["cpu"] and found["packages"]["numpy"]
    check_rows(found)
    for operation in OPERATIONS:
        names = [row["algorithm"] for row in found["rows"] if row["operation"] == operation]
        ours = {"MPI", "auto", *fitting(operation, TWO)}
        windows = {"window"} if operation in collectives.IN_WINDOWS else set()
        assert names[0] == "MPI" and len(set(names)) == len(names)
        assert ours <= set(names) <= ours | windows
    assert all(mean["ratio"] is None for mean in found["means"]), "no size counts in the means"


def test_table_fit_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "table.toml", tmp_path / "picture.png"
    done = bench(
        "collectives", "--rounds", "2", "--min", "64K", "--max", "64K",
        "--operations", "allreduce", "--fit", str(table), "--plot", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "allreduce: times as fast as MPI" in done.stdout and "mean from 64 KiB" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    ((limit, name),) = choice.load(table)["node"][2]["allreduce"]
    assert limit == float("inf") and name in fitting("allreduce", TWO)


def test_beside_gloo_in_16_bits() -> None:
    pytest.importorskip("torch")
    arguments = ("--peer", "torch", "--dtype", "bfloat16", "--operations", "allreduce", *TINY)
    found = report("collectives", *arguments)
    assert {"MPI", "gloo", "ordered"} <= {row["algorithm"] for row in found["rows"]}
    assert all(row["bytes"] == 1 << 14 for row in found["rows"])
    check_rows(found)


def test_an_algorithm_of_ones_own_has_its_row() -> None:
    program = """
import sys
import hpcml
from hpcml.comm.algorithms import find

@hpcml.comm.algorithm("allreduce", cost=lambda n, p, m: n)
def mine(link, x, out, reduction):
    find("allreduce", "ring").run(link, x, out, reduction)

@hpcml.comm.algorithm("reduce", cost=lambda n, p, m: n)
def wrong(link, x, out, reduction, root):
    pass

from hpcml.cli import main
sys.exit(main(["bench", *sys.argv[1:]]))
"""

    def run(operation: str) -> subprocess.CompletedProcess[str]:
        arguments = ["collectives", "--json", *TINY, "--operations", operation]
        return python("-c", program, *arguments, ranks=2, timeout=100)

    done = run("allreduce")
    assert done.returncode == 0, done.stderr
    assert "mine" in [row["algorithm"] for row in json.loads(done.stdout)["rows"]]
    done = run("reduce")
    assert done.returncode != 0
    assert "reduce by wrong: wrong at 16384 bytes" in done.stderr


def test_halo_beside_its_estimate() -> None:
    found = report("halo", "--rounds", "2")
    assert (found["bench"], found["version"], found["ranks"]) == ("halo", 1, 2)
    assert found["alpha"] > 0 and found["beta"] >= 0
    assert len(found["rows"]) == sum(map(len, halo.BLOCKS.values())) * len(halo.WIDTHS)
    for row in found["rows"]:
        # Two ranks side by side in the first dim: each gets one layer of ghosts.
        layer = row["block"] ** (len(row["grid"]) - 1)
        assert row["bytes"] == halo.CHANNELS * row["width"] * layer * 4
        expected = found["alpha"] + row["bytes"] * found["beta"]
        assert row["estimate"] == pytest.approx(expected)
        assert row["seconds"] > 0 and row["copy"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["collectives", "--ranks", "1"], "--ranks 1: communication needs 2 ranks or more"),
        (["collectives", "--peer", "jax"], '--peer="jax" is unknown: use torch'),
        (["collectives", "--fit", "/no/where"], "/no/where cannot be written"),
        (["collectives", "--fit", "t", "--dtype", "float16"], "--fit with --dtype float16"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"hpcml: error: {complaint}" in said.err


def test_without_mpiexec_a_job_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hpcml.comm.child.find_mpiexec", lambda: "")
    assert main(["bench", "halo"]) == 2
    assert "no mpiexec in PATH" in capsys.readouterr().err


def test_factors_are_those_of_nccl_tests() -> None:
    assert {name: factor(4) for name, factor in collectives.BUS_FACTORS.items()} == {
        "allreduce": 1.5, "reduce_scatter": 0.75, "allgather": 0.75, "alltoall": 0.75,
        "gather": 0.75, "scatter": 0.75, "broadcast": 1, "reduce": 1,
    }  # fmt: skip
    assert set(collectives.TRAFFIC) == set(OPERATIONS) == set(collectives.BUS_FACTORS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_result_is_found(operation: str) -> None:
    case = collectives.Case(operation, Axis("solo"), 6, lambda n: np.empty(n, np.float32))
    case.check("auto", case.call(None))
    with pytest.raises(RuntimeError, match=f"{operation} by lazy: wrong at 24 bytes"):
        case.check("lazy", lambda: case.out.fill(7))


def test_ratios_are_of_one_round() -> None:
    """A machine that slows down between rounds changes the times, not the ratio."""
    times = {"MPI": np.array([2.0, 20.0, 6.0]), "ours": np.array([1.0, 10.0, 1.0])}
    assert rounds.ratio(times, "ours", "MPI") == 2
    rows = [
        {"operation": "reduce", "algorithm": "a", "bytes": nbytes, "ratio": ratio}
        for nbytes, ratio in ((1 << 15, 100.0), (1 << 16, 2.0), (1 << 17, 8.0))
    ]
    (mean,) = collectives.means(rows)
    assert mean["ratio"] == pytest.approx(4)


def test_turns_are_taken_by_all_and_repeated_alike() -> None:
    calls: list[str] = []
    times = rounds.alternate(
        Axis("solo"), {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4
    )
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}
    measured = calls.count("a") - 2  # the first two are warm-up
    assert measured == calls.count("b") - 2
    assert measured >= 4 and measured % 4 == 0


def test_ranks_of_a_grid() -> None:
    assert [halo.split(p, 3) for p in (1, 2, 4, 12, 7)] == [
        (1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 2, 2), (7, 1, 1)
    ]  # fmt: skip
