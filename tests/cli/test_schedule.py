"""`hpcml schedule show|check|simulate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcml.cli import main
from hpcml.parallel.pipeline import SCHEDULES, find

SHOWN = """\
# 1f1b: 3 ranks, 3 stages, 4 microbatches, synchronous
# time    0              5              10             15
# rank 0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
# rank 1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
# rank 2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .
name: 1f1b
0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
"""

SIMULATED = """\
pipedream: 2 ranks, 2 stages, 4 microbatches, weights stashed
time    0              5              10             15
rank 0  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3---
rank 1  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .

rank      busy   idle  most activations kept
0           12  20.0%  2
1           12  20.0%  1

stage  rank  versions of weights  updates that gradients are old
0      0     2                    1
1      1     1                    0

makespan 15, bubble 20.0% of the time, 25.0% of the busy time
"""

SMALL = ["--ranks", "3", "--microbatches", "4"]


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["schedule", *args]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_what_show_prints_is_a_file_that_it_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert output(capsys, "show", "1f1b", *SMALL) == SHOWN
    path = tmp_path / "own.txt"
    path.write_text(SHOWN)
    assert output(capsys, "show", str(path)) == SHOWN
    for name in SCHEDULES:
        path.write_text(output(capsys, "show", name))
        assert find(str(path)) == find(name)


def test_show_takes_costs_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    slow = output(capsys, "show", "naive", *SMALL, "--cost", "F=1,B=2,1F=3", "--latency", "1")
    assert "# rank 1  .  .  F0------ .  .  .  .  .  B0---" in slow
    report = json.loads(output(capsys, "show", "gpipe", *SMALL, "--json"))
    assert report["orders"][2] == ["2F0", "2F1", "2F2", "2F3", "2B0", "2B1", "2B2", "2B3"]
    assert (report["ranks"], report["stages"], report["microbatches"]) == (3, 3, 4)


def test_check_of_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "check", "zero-bubble") == (
        "zero-bubble: 4 ranks, 4 stages, 8 microbatches, synchronous: complete, in order, and free "
        "of deadlock even with synchronous sends\n"
    )
    report = json.loads(output(capsys, "check", "interleaved", "--chunks", "3", "--json"))
    assert (report["valid"], report["stages"]) == (True, 12)


@pytest.mark.parametrize("command", ["show", "check", "simulate"])
def test_what_is_wrong_is_marked_and_told_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "own.txt"
    path.write_text(SHOWN.replace("1F1 1B0", "1B0 1F1").replace("2F0 2B0", "2B0 2F0"))
    assert main(["schedule", command, str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "rank 0   0F0  0F1  0F2  0B0  0F3  0B1  0B2  0B3",
        "rank 1   1F0  1B0  1F1  1F2  1B1  1F3  1B2  1B3",
        "rank 2  [2B0] 2F0  2F1  2B1  2F2  2B2  2F3  2B3",
    ]
    assert shown.err == (
        "hpcml: error: 1f1b: rank 2, cell 1 (2B0): comes before 2F0 in cell 2: exchange them\n"
    )
    assert main(["schedule", command, str(path), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["valid"], report["cells"]) == (False, [{"rank": 2, "cell": 1}])
    assert "exchange them" in report["error"]


def test_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--ranks", "2", "--microbatches", "4")
    assert output(capsys, "simulate", "pipedream", *sizes) == SIMULATED
    assert "versions" not in output(capsys, "simulate", "gpipe")
    vertical = output(capsys, "simulate", "pipedream", *sizes, "--vertical-sync")
    assert "\n1      1     2                    1\n" in vertical
    late = output(capsys, "simulate", "pipedream-2bw", *sizes, "--update-every", "1")
    assert "weights double" in late


def test_simulate_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("simulate", "gpipe", *SMALL, "--json", "--cost", "F=2,B=4,2B=5", "--latency", "0.5")
    report = json.loads(output(capsys, *args))
    # The last rank begins after two forwards and messages, and its last gradient goes back alike.
    assert report["makespan"] == 4 + 1 + 4 * 2 + 4 * 5 + 1 + 8
    busy = [row["busy"] for row in report["per_rank"]]
    assert busy == [24, 24, 28]
    assert report["bubble"] == pytest.approx(1 - sum(busy) / 3 / report["makespan"])
    assert [row["peak_activations"] for row in report["per_rank"]] == [4, 4, 4]
    assert [row["staleness"] for row in report["per_stage"]] == [0, 0, 0]
    first = [event for event in report["events"] if event["rank"] == 0][:2]
    assert first == [
        {"rank": 0, "action": "0F0", "start": 0, "end": 2},
        {"rank": 0, "action": "0sendF0", "start": 2, "end": 2.5},
    ]
    waiting = json.loads(output(capsys, *args, "--synchronous"))
    assert waiting["makespan"] > report["makespan"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["show", "1f1v"], 'schedule "1f1v" is unknown, and no file: did you mean 1f1b?'),
        (["check", "gpipe", "--ranks", "0"], "ranks=0: a schedule needs 1 or more"),
        (["check", "interleaved", "--microbatches", "6"], "such as 4 or 8, or 1f1b"),
        (["simulate", "gpipe", "--cost", "F"], 'cost "F": write kind=number'),
        (["simulate", "gpipe", "--cost", "9F=1"], "cost of 9F: gpipe has stages 0 to 3"),
        (["simulate", "gpipe", "--latency", "-1"], "latency=-1.0: a cost is a number, 0 or more"),
        (["simulate", "gpipe", "--vertical-sync"], "only pipedream uses it"),
    ):
        assert main(["schedule", *args]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("hpcml: error: ")
        assert message in shown.err
        assert shown.err.count("\n") == 1


def test_no_mpi_is_loaded() -> None:
    code = (
        "import sys; from hpcml.cli import main; main(['schedule', 'simulate', '1f1b']); "
        "sys.exit('mpi4py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == 0
