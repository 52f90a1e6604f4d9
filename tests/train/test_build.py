"""Parts of a run: threads, parameter groups, the first samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import threadpoolctl

import hpcml
from hpcml import backend, memory, nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh, run
from hpcml.data.core import Data
from hpcml.errors import MemoryLimitError, UserError
from hpcml.models import GPT
from hpcml.parallel import threads
from hpcml.train.build import decay_matrices, try_sample


def test_matrices_decay_and_vectors_do_not() -> None:
    decaying, others = decay_matrices(GPT(7, 8, 2, 2, 16))
    assert "weight_decay" not in decaying and others["weight_decay"] == 0
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decaying["params"]) == 2 + 4 * 2  # tokens, positions; four matrices a block


@pytest.mark.parametrize(("asked", "given"), [("1", 1), ("2", 2), ("1,4", 1)])
def test_threads_are_those_asked_for(
    asked: str, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    (rank,) = threads.share(Mesh())
    blas = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
    assert rank["threads"] == given == backend.threads()
    assert all(i["num_threads"] == 1 for i in blas)  # our threads divide the products


def test_threads_are_the_cores_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(backend, "cores", lambda: [3, 5, 7])
    assert threads.share(Mesh())[0]["threads"] == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads.share(Mesh())


def test_a_number_of_threads_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    with pytest.raises(UserError, match="OMP_NUM_THREADS"):
        threads.share(Mesh())


class Unfit(nn.Module):
    """Of seven features ranks have four and three, and of the six that follow three each."""

    splits: ClassVar = {"up": "column", "down": "row"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 7), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_a_model_that_one_rank_alone_refuses() -> None:
    """The others wait for it in the model: they cannot come to agree."""

    def program() -> None:
        step = hpcml.parallelize(
            Unfit(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(dp=1, tp=2)
        )
        try_sample(step, Data([(np.zeros(2, np.float32), np.zeros(2, np.float32))] * 4))

    with pytest.raises(UserError, match='"row" of 6 inputs: a part of 7 came'):
        run(program, ranks=2, timeout=5)


class Wide(nn.Module):
    """Activations of 40 kB a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 10_000), nn.Linear(10_000, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize(
    ("microbatch", "advice"),
    [
        (0, r"train\.microbatch=1, at most: 2 samples were under way"),
        (3, r"train\.microbatch=1, at most: 2 samples were under way"),
        (1, ""),
    ],
)
def test_samples_that_do_not_fit_into_memory(microbatch: int, advice: str) -> None:
    """What would fit is said, and no more samples are tried than are computed at once."""
    step = hpcml.parallelize(
        Wide(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(), microbatch=microbatch
    )
    data = Data([(np.zeros(2, np.float32), np.zeros(2, np.float32))] * 4)
    memory.set_limit(memory.account().total + 60_000)
    try:
        with pytest.raises(MemoryLimitError, match=advice) if advice else nullcontext():
            try_sample(step, data)
    finally:
        memory.set_limit(0)
