"""Runs of `hpcml train` on a small text, in a process or under mpiexec."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

from tests.comm.jobs import python

TINY = """
[run]
steps = {steps}
log_every = 0
[data]
path = "{text}"
tokenizer = "char"
sequence_length = 16
[model]
layers = 2
heads = 2
width = 32
[optim]
lr = 1e-2
grad_clip = 1.0
[train]
global_batch = 6
"""


def write_text(path: Path, words: int = 3000) -> Path:
    """A text of random words, the same each time."""
    choice = random.Random(0).choice
    path.write_text(" ".join(choice(["to", "be", "or", "not", "that", "is"]) for _ in range(words)))
    return path


def write_job(folder: Path, steps: int = 4) -> Path:
    """A configuration of a tiny GPT on that text."""
    text = write_text(folder / "text.txt")
    job = folder / "job.toml"
    job.write_text(TINY.format(steps=steps, text=text))
    return job


def hpcml(
    *arguments: object, ranks: int = 0, cwd: Path | None = None, timeout: float = 90, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in processes of its own, under mpiexec if `ranks` > 0."""
    return python("-m", "hpcml", *arguments, ranks=ranks, cwd=cwd, timeout=timeout, **env)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, every line of which must be JSON."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    result: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return result
