"""What asynchronous pipelines keep and for how long, and what may be asked of them meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

import hpcml
from hpcml import memory, nn
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.optim import SGD
from hpcml.parallel.pipeline import Schedule, find, lower, simulate
from tests.parallel.cases import classes, serial_mesh, values
from tests.parallel.pipeline.asynchronous import RULES, Feed, Trace, make, same, simulated

cases = pytest.mark.parametrize


def table(rule: str, n: int, batches: int, microbatches: int) -> Schedule:
    options = {"update_every": microbatches} if rule == "double" else {}
    options |= {"vertical_sync": True} if rule == "vertical" else {}
    return find(RULES[rule]["schedule"], n, batches * microbatches, **options)


@cases("n", [2, 3, 4])
@cases("rule", RULES)
def test_as_many_versions_as_the_simulator_says(rule: str, n: int) -> None:
    """Bytes of the parameters, at their peak too; after settling there is one version."""
    expected = simulate(lower(table(rule, n, 5, 4))).versions

    def program() -> None:
        account = memory.account()
        before = account.live["params"]
        step = make("mlp", Mesh(dp=1, pp=n), microbatch=1, **RULES[rule])
        size = step.optimizer.storage.data.nbytes
        assert account.live["params"] - before == size
        account.reset_peak()
        for number in range(5):
            step(classes(number, 4))
        versions = expected[step.mesh["pp"].rank]
        assert account.live["params"] - before == account.peak["params"] - before == versions * size
        step.settle()
        assert account.live["params"] - before == size

    on_threads(program, ranks=n)


def test_the_pipeline_stays_full_between_calls() -> None:
    """Each rank is as many updates behind as microbatches are under way from it on."""

    def program() -> list[int]:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES["stashed"])
        made = []
        for number in range(3):
            step(classes(number, 4))
            made.append(step.optimizer.steps)
        assert step.steps == 3
        step.settle()
        step.settle()  # there is nothing left
        return [*made, step.optimizer.steps]

    assert on_threads(program, ranks=3) == [[1, 5, 9, 12], [2, 6, 10, 12], [3, 7, 11, 12]]


@cases("rule", RULES)
def test_evaluation_is_of_all_updates(rule: str) -> None:
    """As by a plain model with the values that training would end with."""

    def program() -> None:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES[rule])
        for number in range(3):
            step(classes(number, 4))
        found = step.evaluate([classes(9, 4), classes(10, 3)])
        outputs = step.predict(classes(9, 4)[0])
        plain = make("mlp", serial_mesh())
        plain.model.load_state_dict(values(step))
        assert found == pytest.approx(plain.evaluate([classes(9, 4), classes(10, 3)]), rel=1e-13)
        expected = plain.predict(classes(9, 4)[0])
        np.testing.assert_allclose(outputs, expected, rtol=1e-13, atol=1e-14)
        step.check_replicas()
        expected = simulated("mlp", 3, rule, Feed((4, 4, 4)))
        same(Trace(expected.losses, values(step)), expected)

    on_threads(program, ranks=3)


@cases("rule", RULES)
def test_it_learns(rule: str) -> None:
    """Which of three numbers is the largest."""

    def program() -> list[float]:
        model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                              nn.Linear(16, 3))  # fmt: skip
        step = hpcml.parallelize(
            model, loss=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, momentum=0.5,
            mesh=Mesh(dp=1, pp=3), seed=1, microbatch=8, **RULES[rule],
        )  # fmt: skip
        losses = []
        for number in range(60):
            x = np.random.default_rng([9, number]).normal(size=(32, 3))
            losses.append(step((x, x.argmax(axis=1))))
        return losses

    losses = on_threads(program, ranks=3)[0]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_the_norm_is_that_of_the_newest_gradients() -> None:
    """Of the last stage of the batch's last microbatch but one, of those before of earlier ones."""

    def program() -> list[float]:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES["stashed"])
        norms = []
        for number in range(3):
            step(classes(number, 4))
            norms.append(step.grad_norm)
        return norms

    squares = simulated("mlp", 3, "stashed", Feed((4, 4, 4))).squares
    newest = [[squares[end - 4 + stage][stage] for stage in range(3)] for end in (4, 8, 12)]
    expected = [sum(stages) ** 0.5 for stages in newest]
    assert on_threads(program, ranks=3) == [pytest.approx(expected, rel=1e-12)] * 3
