"""Faults on purpose in the midst of training, in every stage."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.comm.faults import Delay, Fault, Raise, Reorder, Stop, Synchronous
from tests.comm.jobs import Job
from tests.parallel.cases import KINDS, make, values

cases = pytest.mark.parametrize
RANKS = 3
# In a later step: a collective that every step of the stage makes.
MAKES = {0: "allreduce", 1: "reduce_scatter", 2: "reduce_scatter", 3: "allgather"}
HARMLESS: list[Fault] = [Delay(0.002, seed=1), Reorder(seed=2), Synchronous()]


def program(stage: int, overlap: bool) -> dict[str, np.ndarray]:
    step = make("gpt", Mesh(), zero=stage, microbatch=1, overlap=overlap)
    for number in range(3):
        step(KINDS["gpt"].batch(5, number))
    return values(step)


def trained(stage: int, overlap: bool = False, **options: Any) -> list[dict[str, np.ndarray]]:
    return hpcml.run(lambda: program(stage, overlap), ranks=RANKS, **options)


@cases("overlap", [False, True])
@cases("stage", [0, 1, 2, 3])
def test_slow_and_reordered_messages_change_nothing(stage: int, overlap: bool) -> None:
    """Nor does a network that buffers nothing."""
    for found, expected in zip(
        trained(stage, overlap, faults=HARMLESS), trained(stage, overlap), strict=True
    ):
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@cases(("stage", "overlap"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_rank_that_stops_is_missed(stage: int, overlap: bool) -> None:
    with pytest.raises(TimeoutError) as caught:
        trained(stage, overlap, timeout=1, faults=[Stop(1, 5, MAKES[stage])])
    text = str(caught.value)
    assert "rank 1" in text.splitlines()[-1] and "Missing in" in text
    assert "parallel/" in text, "says where in the step each rank is"


@cases("overlap", [False, True])
@cases("stage", [0, 1, 2, 3])
def test_a_rank_that_raises_ends_all(stage: int, overlap: bool) -> None:
    with pytest.raises(RuntimeError, match="injected fault") as caught:
        trained(stage, overlap, timeout=20, faults=[Raise(2, 5, MAKES[stage])])
    notes = "\n".join(caught.value.__notes__)
    assert "rank 2 of 3 failed." in notes


PROGRAM = """
import os, signal, time
import hpcml
from hpcml.comm import Mesh
from tests.parallel.cases import KINDS, make
mesh = Mesh()
step = make("gpt", mesh, zero=STAGE, microbatch=2)

def trouble(*_):
    if mesh.rank == 1 and step.optimizer.steps == 2:
        ACTION

step.model.transformer.h[1].mlp.c_fc.weight.register_post_accumulate_grad_hook(trouble)
for number in range(4):
    step(KINDS["gpt"].batch(9, number))
"""
WAITS = rf"at <string>:{PROGRAM.count(chr(10))} \(parallel/placed\.py:\d+\)\n"


@cases(
    ("stage", "action", "said"),
    [
        (0, "time.sleep(100)", WAITS + "missing: rank 1, computing for"),
        (1, "raise RuntimeError('no luck')", "RuntimeError: no luck"),
        (2, "os.kill(os.getpid(), signal.SIGKILL)", "rank 1"),
        (3, "os.kill(os.getpid(), signal.SIGSTOP)", "missing: rank 1, stopped"),
    ],
)
def test_trouble_in_backward_ends_the_job(job: Job, stage: int, action: str, said: str) -> None:
    """Of processes: with what went wrong, and where."""
    program = PROGRAM.replace("STAGE", str(stage)).replace("ACTION", action)
    process = job(3, program, HPCML_TIMEOUT="3")
    output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert re.search(said, output)
