"""The benchmark of starts: what it counts, on jobs that are real and on one that is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import kernels
from hpcml.bench import start
from hpcml.cli import bench_jobs, main
from hpcml.errors import UserError
from hpcml.kernels.cpu import jit
from tests.comm.jobs import child_environment

Done = subprocess.CompletedProcess[str]


def pretended(ranks: int, args: list[str], *, env: dict[str, str], **how: Any) -> Done:
    """A job that leaves what a run leaves: two kernels, compiled by the first rank alone."""
    assert args[:3] == ["-m", "hpcml", "train"] and args[4].startswith("run.dir=")
    assert env["NUMBA_DEBUG_CACHE"] == "1" and how == {"stdout": subprocess.PIPE}
    cache, results = Path(env["HPCML_CACHE_DIR"]), Path(args[4].partition("=")[2])
    files = [cache / "k" / "a.1.nbc", cache / "k" / "b.1.nbc"]
    done = "loaded from" if cache.exists() else "saved to"
    files[0].parent.mkdir(parents=True, exist_ok=True)
    said = [f"[cache] data {done} {str(file)!r}\n" for file in files]
    said += [f"[cache] data loaded from {str(file)!r}\n" for file in files * (ranks - 1)]
    for file in files:
        file.touch()
    results.mkdir()
    (results / "metrics.jsonl").write_text("{}\n")
    return subprocess.CompletedProcess(args, 0, stdout="".join(said))


def test_the_report_of_one_rank_and_of_three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "IMPORTS", ("hpcml",))
    report = start.run(3, pretended)
    assert (report["bench"], report["version"]) == ("start", 1) and report["cores"] >= 1
    (imported,) = report["imports"]
    assert imported["modules"] == "hpcml" and imported["seconds"] > 0
    rows = report["rows"]
    assert [(row["start"], row["ranks"]) for row in rows] == [
        ("cold", 1), ("warm", 1), ("cold", 3), ("warm", 3)
    ]  # fmt: skip
    assert [row["compiled"] for row in rows] == [2, 0, 2, 0]
    assert [row["loaded"] for row in rows] == [0, 2, 4, 6]
    assert [row["twice"] for row in rows] == [0] * 4
    for row in rows:
        assert row["kernels"] == 2 and row["seconds"] < row["whole"] + 1
    assert start.table(report).count("warm") == 2


def test_what_is_compiled_twice_is_noticed() -> None:
    said = "[cache] data saved to '/c/a.1.nbc'[cache] index saved to '/c/a.nbi'\n\n"
    more = "[cache] data saved to '/c/b.1.nbc'\n[cache] data loaded from '/c/a.1.nbc'\n"
    assert start.cache_use(said + more) == {"compiled": 2, "twice": 0, "loaded": 1}
    assert start.cache_use(said + more + said) == {"compiled": 3, "twice": 1, "loaded": 1}


def test_numba_says_what_it_compiles(tmp_path: Path) -> None:
    source = "import numba\n\n@numba.njit('int64(int64)', cache=True)\ndef f(x):\n    return x\n"
    (tmp_path / "program.py").write_text(source)
    environment = child_environment(NUMBA_DEBUG_CACHE="1", NUMBA_CACHE_DIR=str(tmp_path))
    uses = [
        start.cache_use(subprocess.run(
            [sys.executable, str(tmp_path / "program.py")], env=environment, check=True,
            capture_output=True, text=True, timeout=100,
        ).stdout)
        for _ in range(2)
    ]  # fmt: skip
    assert uses == [
        {"compiled": 1, "twice": 0, "loaded": 0}, {"compiled": 0, "twice": 0, "loaded": 1}
    ]  # fmt: skip


def test_a_run_that_finds_all_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real jobs, on the kernels that these tests have: to compile them takes too long here."""
    kernels.compiled("float32")
    monkeypatch.setattr(start, "IMPORTS", ())
    monkeypatch.setattr(start, "_WARM", 1)
    real, cache = bench_jobs.job, str(jit.cache_folder().parent)

    def job(ranks: int, args: list[str], *, env: dict[str, str], **how: Any) -> Done:
        return real(ranks, args, env=env | {"HPCML_CACHE_DIR": cache}, **how)

    monkeypatch.setattr(bench_jobs, "job", job)
    assert main(["bench", "start", "--ranks", "1", "--json"]) == 0
    cold, warm = json.loads(capsys.readouterr().out)["rows"]
    assert cold["compiled"] == warm["compiled"] == 0
    assert cold["loaded"] == warm["loaded"] >= len({kernel for kernel, _ in jit._registry})
    assert 0 < warm["seconds"] < warm["whole"]


def test_a_job_that_fails_and_too_few_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(ranks: int, args: list[str], **how: Any) -> Done:
        return subprocess.CompletedProcess(args, 1, stdout="")

    with pytest.raises(UserError, match="--ranks 2: this job failed"):
        start.starts(2, failing)
    assert main(["bench", "start", "--ranks", "0"]) == 2
    assert capsys.readouterr().err == "hpcml: error: --ranks 0: start at least 1\n"
