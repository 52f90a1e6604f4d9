"""What one rank alone sees that cannot be done, all ranks refuse in the same line: none waits."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from hpcml.parallel.refusals import Refusals
from tests.parallel.cases import name_of, ranks_of

cases = pytest.mark.parametrize


class Shrinking(nn.Module):
    """A third of the height is left before the region ends; then samples are normalised."""

    spatial: ClassVar[dict[str, str]] = {"avgpool": "gather"}

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(3), nn.Conv2d(1, 3, 1)
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Any) -> Any:
        return self.norm(self.flatten(self.avgpool(self.conv(self.pool(x)))))


def images(samples: int, *sizes: int) -> Any:
    random = np.random.default_rng(samples)
    return random.normal(size=(samples, 1, *sizes)), random.integers(0, 3, samples)


BAD = {
    "small": (images(2, 5, 9), r"pool \(MaxPool2d\): outputs of \(1, 3\) cannot be cut"),
    "few": (images(3, 9, 9), r"norm \(BatchNorm1d\): \(1, 3\) has one value a channel"),
}
"""One microbatch, which only the first data-parallel rank has; two, the last one of one sample."""


@cases(
    ("layout", "options", "bad"),
    [
        ({"dp": 2, "sp_h": 2}, {}, "small"),
        ({"dp": 2, "sp_h": 2}, {"zero": 3}, "small"),
        ({"dp": 2, "sp_h": 2}, {}, "few"),
        ({"dp": 3}, {"zero": 1}, "few"),
        ({"dp": 2}, {"mode": "local", "period": 2}, "few"),
        ({"dp": 2}, {"mode": "async", "staleness": 1}, "few"),
    ],
    ids=name_of,
)
def test_all_refuse(layout: dict[str, int], options: dict[str, Any], bad: str) -> None:
    batch, message = BAD[bad]

    def program() -> list[str]:
        step = hpcml.parallelize(
            Shrinking(), loss=nn.CrossEntropyLoss(), optimizer=hpcml.optim.SGD, lr=0.1, seed=1,
            mesh=Mesh(**layout), microbatch=2, **options,
        )  # fmt: skip
        good, lines = images(4, 9, 9), []
        assert np.isfinite(step(good))
        with pytest.raises(UserError, match=message) as raised:
            [step(batch) for _ in range(2)]  # late by as many updates as a mode allows
        lines.append(str(raised.value))
        assert np.isfinite(step(good)), "it can go on"
        if bad == "small":
            with pytest.raises(UserError, match=message) as raised:
                step.measure([good, batch])
            lines.append(str(raised.value))
        assert step.measure([good])["loss"] > 0
        return lines

    found = on_threads(program, ranks=ranks_of(layout), timeout=20)
    assert all(lines == found[0] for lines in found) and "\n" not in "".join(found[0])


def test_of_what_is_refused_the_first_words_are_kept_and_nothing_that_was_computed() -> None:
    """Else a later step, short of the memory that is held, refuses in its turn and is told."""
    refusals, computed = Refusals(), []

    def refuse(message: str) -> None:
        activations = np.zeros(9)
        computed.append(weakref.ref(activations))
        raise UserError(message)

    for message in ("a sample is too large", "no memory"):
        with refusals.kept(lambda: True):
            refuse(message)
    assert all(found() is None for found in computed)
    with pytest.raises(UserError, match="a sample is too large"):
        refusals.tell(Mesh()["dp"], np.array([np.nan]))


class Choosy(nn.Module):
    """Refuses a sample that is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 1), nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        if (x.data > 50).any():
            raise UserError("a sample is too large")
        return self.layer(self.drop(x))


@cases("stage", [0, 1, 2])
@cases("bad", [1, 3])
def test_what_one_rank_refuses_ends_those_that_wait_for_it(stage: int, bad: int) -> None:
    """In deterministic mode gradients of several microbatches meet in backward, at any stage."""

    def program() -> None:
        step = hpcml.parallelize(
            Choosy(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(deterministic=True),
            zero=stage, microbatch=1,
        )  # fmt: skip
        x, y = np.ones((4, 6)), np.ones((4, 1))
        step((x, y))
        x[bad] = 100
        step((x, y))

    with pytest.raises(UserError, match="a sample is too large"):
        on_threads(program, ranks=2, timeout=20)


@cases("stage", [0, 1, 2, 3])
@cases("held", [False, True])
def test_what_is_refused_leaves_nothing(stage: int, held: bool) -> None:
    """The gradient of its other samples was added to that of the next batch."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(5, 6)), random.normal(size=(5, 1))
    bad = x.copy()
    bad[:2] = 100  # on both ranks, which need each other from stage 2 on

    def program(refused: bool) -> list[float]:
        step = hpcml.parallelize(
            Choosy(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, lr=0.1, mesh=Mesh(),
            zero=stage, microbatch=1,
        )  # fmt: skip
        losses = [step((x, y))]
        if refused:
            with (
                step.no_sync() if held and stage < 2 else nullcontext(),
                pytest.raises(UserError, match="a sample is too large"),
            ):
                step((bad[::-1] if stage < 2 else bad, y))
        return losses + [step((x[:size], y[:size])) for size in (3, 5)]

    found, expected = (on_threads(program, refused, ranks=2) for refused in (True, False))
    assert found == expected
