"""Replicas that drift apart are noticed."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.comm import Axis, Mesh
from hpcml.parallel.replicas import ReplicaError, check_replicas
from tests.train.jobs import hpcml as command
from tests.train.jobs import write_job


def model() -> nn.Module:
    hpcml.manual_seed(3)
    made = nn.Linear(4, 3)
    for parameter in made.parameters():
        parameter.data = np.arange(parameter.data.size, dtype=np.float32).reshape(parameter.shape)
    return made


def values_of(made: nn.Module) -> list[tuple[str, np.ndarray]]:
    return [(name, parameter.numpy()) for name, parameter in made.named_parameters()]


def drifted(dp: Axis, name: str, *ranks: int) -> None:
    made = model()
    if dp.rank in ranks:
        dict(made.named_parameters())[name].data[-1] += 1e-6
    check_replicas(values_of(made), dp)


def test_equal_replicas_pass(mesh: Mesh) -> None:
    check_replicas(values_of(model()), mesh["dp"])
    check_replicas([], mesh["dp"])


def test_the_first_difference_and_its_ranks_are_named() -> None:
    def run(name: str, *ranks: int) -> None:
        hpcml.run(lambda: drifted(Mesh()["dp"], name, *ranks), ranks=4)

    with pytest.raises(ReplicaError, match=r"weight differs on rank 2 .*from ranks 0, 1, 3\n"):
        run("weight", 2)
    with pytest.raises(ReplicaError, match=r"bias differs on ranks 1, 2 .*from ranks 0, 3\n"):
        run("bias", 1, 2)


@pytest.mark.mpi(min_size=2)
def test_one_altered_parameter_is_an_error_on_every_rank() -> None:
    dp = Mesh()["dp"]
    with pytest.raises(ReplicaError, match="parameter bias differs on rank"):
        drifted(dp, "bias", dp.size - 1)


DRIFTING = """
import hpcml
from hpcml.comm.launch import read
class Drifting(hpcml.optim.SGD):
    def step(self, *args, **kwargs):
        super().step(*args, **kwargs)
        if self.steps == 3 and read().rank == 1:
            self.storage.data[0] += 1e-3
"""


def test_a_run_checks_at_the_steps_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(textwrap.dedent(DRIFTING))
    job = write_job(tmp_path, steps=6)
    options = ["optim.kind=own:Drifting", "run.check_replicas=2", f"run.dir={tmp_path / 'r'}"]
    done = command("train", job, *options, ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ReplicaError: replicas along dp have drifted apart: parameter ") == 1
    steps = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    # The third drifts, the fourth is followed by a check; its record may be lost with the job.
    assert len(steps) in (3, 4)
