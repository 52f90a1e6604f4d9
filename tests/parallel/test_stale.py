"""Updates that come late: never later than the bound, the same everywhere, and none is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.comm.faults import Delay
from hpcml.comm.running import OnNode
from hpcml.errors import NonFiniteError, UserError
from hpcml.parallel.stale import StaleStep
from tests.parallel.cases import KINDS, decay_matrices, make, reference, run, serial_mesh, values

cases = pytest.mark.parametrize


@cases("optimizer", ["sgd", "adamw"])
@cases("size", [1, 5, 8])
@cases("kind", ["own", "gpt"])
def test_bound_0_is_synchronous(mesh: Mesh, kind: str, size: int, optimizer: str) -> None:
    """With clipping, groups and dropout, uneven batches and ranks without samples."""
    expected = reference(kind, "float64", optimizer, size, 5)
    found = run(kind, mesh, "float64", optimizer, size, 2, 5, mode="async")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-11)
    for after, parameters in expected.parameters.items():
        for name, array in parameters.items():
            np.testing.assert_allclose(
                found.parameters[after][name], array, rtol=0, atol=1e-12, err_msg=name
            )


def late(bound: int, steps: int = 12, **options: Any) -> tuple[Any, ...]:
    """Train on a rank; what its steps lacked, its losses, and its parameters at the end."""
    step = make("own", Mesh(), mode="async", staleness=bound, groups=decay_matrices, **options)
    losses = [step(KINDS["own"].batch(7, number)) for number in range(steps)]
    step.settle()
    assert step.optimizer.steps == steps
    assert step.staleness is not None
    return step.staleness, losses, values(step)


@cases("ranks", [2, 3, 4])
@cases("bound", [1, 3])
def test_staleness_is_there_and_stays_within_the_bound(bound: int, ranks: int) -> None:
    """Where messages take long; all ranks end with the same parameters to the bit."""
    found = hpcml.run(late, bound, ranks=ranks, faults=[Delay(0.03)])
    for staleness, _, parameters in found:
        assert staleness.max <= bound
        assert staleness.counts.total() == 12
        assert 0 < staleness.mean <= bound
        np.testing.assert_equal(parameters, found[0][2])


@cases("optimizer", ["sgd", "adamw"])
def test_delayed_updates_are_those_written_out(optimizer: str) -> None:
    """Where nothing ever comes before it must: the gradient of step k from k - bound updates.

    The rate changes from step to step, and belongs to the gradient's step.
    """
    bound, steps = 2, 7

    def delayed() -> dict[str, np.ndarray]:
        step = make("mlp", Mesh(), "float64", optimizer, mode="async", staleness=bound)
        assert isinstance(step, StaleStep)
        step._sums.ready = lambda: False  # type: ignore[method-assign]
        for number in range(steps):
            step.optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
            step(KINDS["mlp"].batch(5, number))
            assert step.staleness.last == max(0, min(number - 1, bound))
        step.settle()
        return values(step)

    plain = make("mlp", serial_mesh(), "float64", optimizer)
    shadow = make("mlp", serial_mesh(), "float64", optimizer)
    storage, history = plain.optimizer.storage, []
    for number in range(steps):
        history.append(storage.data.copy())
        # The first step is not late; after it the delay builds up.
        seen = history[max(min(number, 1), number - bound)]
        shadow.optimizer.storage.data[...] = seen
        for group in shadow.optimizer.param_groups:
            group["lr"] = 0.0
        shadow(KINDS["mlp"].batch(5, number))
        plain.optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
        for own, other in zip(storage.parameters, shadow.optimizer.storage.parameters, strict=True):
            own.gradient = own.gradient_buffer
            own.gradient_buffer[...] = other.gradient_buffer  # type: ignore[index]
        plain.optimizer.step()
    expected = values(plain)
    for found in hpcml.run(delayed, ranks=2):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


def test_a_slow_rank_does_not_hold_the_others_at_once() -> None:
    """The others go on by as many steps as the bound says, and not by more."""
    bound = 2
    ahead, follows = threading.Barrier(3), threading.Event()

    def walk() -> None:
        step = make("own", Mesh(), mode="async", staleness=bound)
        step(KINDS["own"].batch(6, 0))
        for number in range(1, 6):
            if step.axis.rank == 0 and number == 1:
                ahead.wait(60)  # the others have made so many steps that this rank has not
                time.sleep(0.1)
                follows.set()
            step(KINDS["own"].batch(6, number))
            if step.axis.rank > 0 and number == bound:
                ahead.wait(60)
            assert number <= bound or follows.is_set()
        step.settle()

    hpcml.run(walk, ranks=3)


def test_the_loss_is_that_of_the_newest_update() -> None:
    _, exact, _ = hpcml.run(late, 0, ranks=2)[0]

    def steps() -> None:
        step = make("own", Mesh(), mode="async", staleness=2, groups=decay_matrices, lr=0.0)
        still = make("own", Mesh(), groups=decay_matrices, lr=0.0)
        known = []
        for number in range(6):
            batch = KINDS["own"].batch(7, number)
            found = step(batch)
            known.append(still(batch))
            assert found == pytest.approx(known[step.optimizer.steps - 1], rel=1e-12)
            assert number + 1 - 2 <= step.optimizer.steps <= number + 1

    hpcml.run(steps, ranks=2, faults=[Delay(0.02)])
    assert exact[0] == pytest.approx(hpcml.run(late, 3, ranks=2)[0][1][0], rel=1e-12)


@cases("bound", [0, 1, 3])
def test_evaluation_sees_all_updates(bound: int) -> None:
    def seen() -> None:
        step = make("own", Mesh(), mode="async", staleness=bound)
        for number in range(5):
            step(KINDS["own"].batch(7, number))
        loss = step.evaluate([KINDS["own"].batch(9, 77)])
        assert step.optimizer.steps == 5
        assert loss == step.evaluate([KINDS["own"].batch(9, 77)])
        step.check_replicas()

    hpcml.run(seen, ranks=3, faults=[Delay(0.01)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@cases("bound", [0, 2])
def test_what_is_not_finite_stops_all_ranks_in_the_same_call(bound: int) -> None:
    def stopped() -> tuple[int, str, dict[str, np.ndarray]]:
        step = make("own", Mesh(), "float32", mode="async", staleness=bound)
        x, y = KINDS["own"].batch(6, 0)
        for number in range(9):
            if number == 3:
                x = x.copy()
                x[0] = np.nan
            try:
                step((x, y))
            except NonFiniteError as error:
                return number, str(error), values(step)
        raise AssertionError("none was raised")

    found = hpcml.run(stopped, ranks=3, faults=[Delay(0.02)])
    for number, said, parameters in found:
        assert number == 3 + bound and "step 3: loss nan" in said
        np.testing.assert_equal(parameters, found[0][2])
        assert all(np.isfinite(array).all() for array in parameters.values())


def test_what_is_not_finite_and_still_on_its_way_is_found_at_the_end(mesh: Mesh) -> None:
    step = make("own", mesh, "float32", mode="async", staleness=3)
    x, y = KINDS["own"].batch(6, 0)
    step((x, y))
    step((x * np.nan, y))
    with pytest.raises(NonFiniteError, match="step 1"):
        step.settle()


def test_gradients_under_way_count_as_buffers(mesh: Mesh) -> None:
    """Where ranks share memory each gives its part of it."""
    account = hpcml.memory.account()
    before = account.live["buffers"]
    step = make("gpt", mesh, mode="async", staleness=2)
    held = account.live["buffers"] - before
    grad = step.optimizer.storage.grad.nbytes
    if isinstance(step, StaleStep) and isinstance(step._sums, OnNode):
        assert 0 < held - 3 * grad / mesh.world.size < 8192
    else:
        assert held == 3 * grad


def test_no_sync_is_refused(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="mode=async"):
        make("own", mesh, mode="async").no_sync()


# --- elastic averaging ----------------------------------------------------------------------------


def elastic(mesh: Mesh, bound: int, period: int, steps: int = 8) -> Any:
    step = make("mlp", mesh, mode="async", staleness=bound, elastic=0.2, period=period)
    for number in range(steps):
        step(KINDS["mlp"].batch(8, number))
    return step


@pytest.mark.mpi(min_size=2)
def test_elastic_averaging_is_that_of_the_paper() -> None:
    """With bound 0: its equations (2) and (3), written out with all ranks' values."""
    mesh = Mesh()
    step = elastic(mesh, 0, 1, 0)
    alone = make("mlp", mesh, mode="local", period=1000)  # the same gradients, no pull
    center = step.center.copy()
    for number in range(4):
        alone.optimizer.storage.data[...] = step.optimizer.storage.data
        batch = KINDS["mlp"].batch(8, number)
        step(batch)
        alone(batch)
        own = alone.optimizer.storage.data
        total = mesh.world.allreduce(own - center)
        np.testing.assert_allclose(
            step.optimizer.storage.data, own - 0.2 * (own - center), rtol=0, atol=1e-13
        )
        center += 0.2 * total
        np.testing.assert_allclose(step.center, center, rtol=0, atol=1e-13)


def test_the_centre_is_no_state_of_the_optimizer(mesh: Mesh) -> None:
    """The formula beside the table of a run's memory knows none."""
    live = hpcml.memory.account().live
    before = live["optim"]
    step = elastic(mesh, 0, 1, 0)
    states = live["optim"] - before
    plain = make("mlp", mesh, mode="local", period=2)
    assert live["optim"] - before == 2 * states
    del step, plain


def test_elastic_rounds_keep_the_bound() -> None:
    def late() -> tuple[Any, ...]:
        step = elastic(Mesh(), 2, 2, 20)
        step.settle()
        np.testing.assert_array_equal(step.optimizer.storage.data, step.center)
        step.check_replicas()
        return step.staleness, values(step)

    found = hpcml.run(late, ranks=3, faults=[Delay(0.03)])
    for staleness, parameters in found:
        assert staleness.max <= 2 and staleness.counts.total() == 10
        np.testing.assert_equal(parameters, found[0][1])
    assert max(staleness.max for staleness, _ in found) > 0
