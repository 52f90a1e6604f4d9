"""Bad input ends a run with one clear line, on one rank and on four, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcml.cli import main
from tests.comm.jobs import child_environment, mpiexec, python
from tests.train.jobs import hpcml, metrics, summary, write_job

USER = """
from hpcml import nn
class NoForward(nn.Module):
    def __init__(self, need, layers, heads, width):
        super().__init__()
        self.layer = nn.Linear(2, 2)
def nothing(layers, heads, width):
    return 3
class Diverges(nn.Module):
    def forward(self, logits, target):
        return logits.mean() * float("nan")
def takes_nothing():
    pass
def a_vector(logits, target):
    return logits.sum((1, 2))
def crash(record):
    import hpcml.comm.world
    if hpcml.comm.world.world().rank == 1:
        raise RuntimeError("rank one had enough")
def slow(record):
    import time
    time.sleep(0.2)
"""

# (override, exit code, words of the line)
CASES = [
    ("model.heds=4", 2, ["model.heds=4", "model.heads"]),
    ("nothing.at_all=1", 2, ["[nothing]"]),
    ("model.kind=gtp", 2, ['model.kind="gtp"', "gpt"]),
    ("optim.schedule=cosin", 2, ['"cosin"', "cosine"]),
    ("model.width=-4", 2, ["width=-4"]),
    ("model.layers=0", 2, ["layers=0"]),
    ("train.global_batch=0", 2, ["train.global_batch=0"]),
    ("run.steps=-1", 2, ["run.steps=-1"]),
    ("model.heads=3", 2, ["heads=3", "width=32"]),
    ("mesh.dp=7", 2, ["dp(7)", "mesh.dp=0"]),
    ("mesh.sp_h=7", 2, ["sp_h(7)"]),
    ("data.path=missing.txt", 2, ["missing.txt", "does not exist"]),
    ("data.path=empty.txt", 2, ["empty.txt", "empty"]),
    ("data.path=binary.bin", 2, ["binary.bin", "binary"]),
    ("data.path=short.txt", 2, ["sequence_length=16", "shorter"]),
    ("run.dir=used", 2, ['run.dir="used"', "run.overwrite=true"]),
    ("run.dir=text.txt/below", 2, ["text.txt/below", "writable"]),
    ("callback.kind=user:takes_nothing", 2, ["callback", "one argument"]),
    ("loss.kind=user:a_vector", 2, ["one element", "shape"]),
    ("model.kind=user:missing", 2, ["user:missing"]),
    ("model.kind=user:NoForward", 2, ["needs need"]),
    ("model.kind=user:nothing", 2, ["made a int", "hpcml.nn.Module"]),
    ("loss.kind=user:Diverges", 3, ["loss nan", "learning rate"]),
    ("optim.lr=1e30", 3, ["step 1", "learning rate"]),
    ("optim.lr=fast", 2, ['optim.lr="fast"', "number"]),
    ("HPCML_LOG=loud", 2, ['HPCML_LOG="loud"']),
]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = write_job(tmp_path)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "short.txt").write_text("to be")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user", raising=False)
    return made


def _split(override: str) -> tuple[list[str], dict[str, str]]:
    name, value = override.split("=", 1)
    return ([override], {}) if "." in name else ([], {name: value})


@pytest.mark.parametrize(("override", "code", "words"), CASES)
def test_one_rank(
    job: Path, override: str, code: int, words: list[str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options, environment = _split(override)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(job), *options]) == code
    said = capsys.readouterr().err
    assert said.startswith("hpcml: error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert (job.parent / "used" / "metrics.jsonl").read_text() == "precious"


# One of each way to an end: before there is a mesh, by one rank for all, in training, and what only
# a process of its own shows. That every rank comes to the same words of every case is tested below.
WAYS = ("model.heds=4", "run.dir=used", "loss.kind=user:Diverges", "HPCML_LOG=loud")


@pytest.mark.parametrize(("override", "code", "words"), [c for c in CASES if c[0] in WAYS])
def test_four_ranks(job: Path, override: str, code: int, words: list[str]) -> None:
    options, environment = _split(override)
    done = hpcml("train", job, *options, ranks=4, cwd=job.parent, **environment)
    assert done.returncode == code
    assert done.stderr.startswith("hpcml: error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


ONE_AFTER_THE_OTHER = """
import json, sys
from hpcml.cli.train import _train
from hpcml.comm import Mesh
from hpcml.errors import UserError
job, *overrides = sys.argv[1:]
world = Mesh().world
for number, override in enumerate(overrides):
    refusal = None
    try:
        _train([job, f"run.dir={number}", override])
    except UserError as error:
        refusal = error.exit_code, error.report()
    refusals = world.allgather_object(refusal)
    if world.rank == 0:
        print(json.dumps(refusals), flush=True)
"""


def test_four_ranks_refuse_alike(job: Path) -> None:
    """All cases in one job: every rank gets to the same words, and can go on."""
    cases = [case for case in CASES if not _split(case[0])[1]]
    overrides = [override for override, _, _ in cases]
    done = python("-c", ONE_AFTER_THE_OTHER, job, *overrides, ranks=4, cwd=job.parent)
    assert done.returncode == 0, done.stderr
    for (override, code, words), line in zip(cases, done.stdout.splitlines(), strict=True):
        refusals = json.loads(line)
        assert refusals == [refusals[0]] * 4 and refusals[0][0] == code, (override, line)
        said = refusals[0][1]
        assert "\n" not in said and all(word in said for word in words), said


def test_overwriting_is_asked_for_and_happens_last(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake elsewhere must not cost the results that were to be replaced."""
    used = job.parent / "used" / "metrics.jsonl"
    assert main(["train", str(job), "run.dir=used", "run.overwrite=true", "model.heads=3"]) == 2
    assert used.read_text() == "precious"
    assert main(["train", str(job), "run.dir=used", "run.overwrite=true"]) == 0
    assert len(metrics(used.parent)) == 4
    (used.parent / "thesis.tex").touch()
    assert main(["train", str(job), "run.dir=used", "run.overwrite=true"]) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_of_two_runs_into_one_folder_one_is_refused(job: Path) -> None:
    """Both found it empty when they began; the results of neither may be mixed or lost."""
    command = [sys.executable, "-m", "hpcml", "train", str(job), "run.dir=both", "run.steps=60"]
    runs = [
        subprocess.Popen([*command, f"run.seed={seed}"], env=child_environment(), cwd=job.parent,
                         stderr=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]  # fmt: skip
    said = [run.communicate(timeout=90)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    assert "run.dir" in "".join(said)
    assert len(metrics(job.parent / "both")) == 60


def test_what_a_killed_run_left_can_be_overwritten(job: Path) -> None:
    used = job.parent / "used"
    for name in (".summary.json.tmp", "model.tmp", ".tmpAbC"):
        (used / name).touch()
    assert main(["train", str(job), "run.dir=used", "run.overwrite=true"]) == 0
    assert not list(used.glob("*.tmp"))


def test_a_divergence_is_told_in_the_summary(job: Path) -> None:
    assert main(["train", str(job), "loss.kind=user:Diverges"]) == 3
    folder = job.parent / "runs" / "job"
    assert summary(folder)["exit"] == "non-finite" and metrics(folder) == []


def test_output_into_a_closed_pipe_does_not_end_the_run(job: Path) -> None:
    command = f"{sys.executable} -m hpcml train {job} run.log_every=1 run.steps=30 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], env=child_environment(), cwd=job.parent, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert summary(job.parent / "runs" / "job")["exit"] == "completed"


def test_the_log_is_quiet_until_asked_and_names_the_rank(job: Path) -> None:
    quiet = hpcml("train", job, "run.dir=a", ranks=2, cwd=job.parent)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    loud = hpcml("train", job, "run.dir=b", ranks=2, cwd=job.parent, HPCML_LOG="info")
    lines = loud.stderr.splitlines()
    assert lines and all("INFO" in line for line in lines)
    assert all(any(f"[rank {rank}]" in line for line in lines) for rank in (0, 1))


def test_copies_of_a_world_of_one_are_refused(job: Path) -> None:
    done = hpcml("train", job, cwd=job.parent, SLURM_NTASKS="4", SLURM_PROCID="0")
    assert done.returncode == 2
    assert "SLURM_NTASKS" in done.stderr and done.stderr.count("\n") == 1


def test_an_exception_on_one_rank_ends_the_job_with_its_traceback_once(job: Path) -> None:
    done = hpcml("train", job, "callback.kind=user:crash", ranks=3, cwd=job.parent, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: rank one had enough") == 1
    assert done.stderr.count("Traceback") == 1


def test_an_exception_leaves_a_summary_that_says_failed(job: Path) -> None:
    (job.parent / "user.py").write_text("def crash(record):\n    raise RuntimeError('enough')\n")
    with pytest.raises(RuntimeError, match="enough"):
        main(["train", str(job), "callback.kind=user:crash"])
    folder = job.parent / "runs" / "job"
    assert summary(folder)["exit"] == "failed" and len(metrics(folder)) == 1
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupt_ends_cleanly_and_leaves_the_metrics(job: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "hpcml", "train", str(job), "run.steps=1000",
               "callback.kind=user:slow"]  # fmt: skip
    if ranks > 1:
        command = [mpiexec(), "-n", str(ranks), *command]
    process = subprocess.Popen(
        command, env=child_environment(), cwd=job.parent, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    folder, deadline = job.parent / "runs" / "job", time.monotonic() + 60
    while not ((folder / "metrics.jsonl").exists() and metrics(folder)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    result = summary(folder)
    assert result["exit"] == "interrupted"
    assert result["steps"] == len(metrics(folder)) < 1000
