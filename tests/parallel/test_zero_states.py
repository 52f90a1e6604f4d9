"""What a sharded model is like: its state, errors, and 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError
from tests.parallel.cases import KINDS, make, serial_mesh, values

cases = pytest.mark.parametrize


def test_state_dict_of_a_sharded_model(mesh: Mesh) -> None:
    """Copies: what is gathered is gone when the next unit is."""
    step = make("gpt", mesh, zero=3)
    state = step.model.state_dict()
    for name, array in values(step).items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


@cases("dtype", ["float32", "bfloat16"])
@cases("stage", [0, 1, 2, 3])
def test_a_state_that_is_loaded_reaches_what_ranks_hold(mesh: Mesh, stage: int, dtype: str) -> None:
    """Masters and shards too: the next update starts from it."""
    given = {
        name: np.random.default_rng(5).normal(size=p.shape).astype(np.float32)
        for name, p in KINDS["mlp"].model().named_parameters()
    }
    step = make("mlp", mesh, hpcml.backend.dtype(dtype), zero=stage, lr=0.0)
    batch = KINDS["mlp"].batch(6, 0)
    step(batch)
    step.model.load_state_dict(given)
    step(batch)
    for name, array in step.gathered():
        np.testing.assert_array_equal(array, given[name], err_msg=name)
    loss = make("mlp", serial_mesh(), hpcml.backend.dtype(dtype), lr=0.0)
    loss.model.load_state_dict(given)
    assert step(batch) == pytest.approx(loss(batch), rel=1e-2 if dtype == "bfloat16" else 1e-6)


@cases("stages", [(3, 0), (3, 3), (0, 3), (2, 1)])
def test_training_goes_on_in_another_layout(mesh: Mesh, stages: tuple[int, int]) -> None:
    """What was learned is not lost when a sharded model is laid out anew."""
    first = make("mlp", mesh, zero=stages[0])
    first(KINDS["mlp"].batch(6, 0))
    learned = values(first)
    again = make("mlp", mesh, zero=stages[1], model=first.model)
    for name, array in values(again).items():
        np.testing.assert_array_equal(array, learned[name], err_msg=name)
    again(KINDS["mlp"].batch(6, 1))
    assert any((array != learned[name]).any() for name, array in values(again).items())


@cases("stage", [0, 1, 2, 3])
def test_training_goes_on_after_an_error(mesh: Mesh, stage: int) -> None:
    """In the middle of a backward: nothing of it is left over."""
    step, expected = (
        make("own", where, zero=zero, microbatch=1)
        for where, zero in ((mesh, stage), (serial_mesh(), 0))
    )
    batch = KINDS["own"].batch(6, 0)

    def fail(*_: Any) -> None:
        raise RuntimeError("by the way")

    handle = step.model.first.weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RuntimeError, match="by the way"):
        step(batch)
    handle.remove()
    step.samples = 0
    step(batch)
    expected(batch)
    for name, array in values(expected).items():
        np.testing.assert_allclose(values(step)[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("stage", [0, 1, 2, 3])
def test_the_place_where_numbers_stop_being_finite(mesh: Mesh, stage: int) -> None:
    batch = KINDS["own"].batch(5, 0)
    step = make("own", mesh, zero=stage)
    handle = step.model.shared.register_forward_hook(lambda m, i, out: out * np.inf)
    with pytest.raises(NonFiniteError, match=r"output of shared \(Linear\) is not finite"):
        step(batch)
    handle.remove()
    weight = step.optimizer.storage.home[id(step.model.head.weight)]
    weight.data[...] = np.nan
    with pytest.raises(NonFiniteError, match=r"parameter \S+ is not finite"):
        step(batch)


# --- 16 bits ------------------------------------------------------------------------------------


@cases("dtype", ["bfloat16", "float16"])
@cases("stage", [0, 1, 2, 3])
def test_sixteen_bits_in_every_stage(mesh: Mesh, stage: int, dtype: str) -> None:
    """Near the run in float32, and masters are float32."""
    kind = hpcml.backend.dtype(dtype)
    step = make("gpt", mesh, dtype=kind, zero=stage, microbatch=2)
    exact = make("gpt", serial_mesh(), dtype="float32")
    for number in range(4):
        batch = KINDS["gpt"].batch(8, number)
        assert step(batch) == pytest.approx(exact(batch), rel=0.02)
    assert np.isfinite(step.grad_norm)
    start, expected = values(make("gpt", serial_mesh(), dtype="float32")), values(exact)
    for name, array in values(step).items():
        assert array.dtype == np.float32
        moved = np.linalg.norm(expected[name] - start[name])
        assert np.linalg.norm(array - expected[name]) <= 0.25 * moved, name
    assert step.optimizer.storage.data.dtype == kind == step.optimizer.storage.grad.dtype


@cases("stage", [0, 1, 2, 3])
def test_an_overflow_is_skipped_by_all_ranks_alike(mesh: Mesh, stage: int) -> None:
    step = make("mlp", mesh, dtype="float16", zero=stage)
    assert step.scaler is not None
    step.scaler.scale = 2.0**40
    batch, before, scales = KINDS["mlp"].batch(8, 0), values(step), []
    while not np.isfinite(step.grad_norm):
        step(batch)
        scales.append(step.scaler.scale)
    assert len(scales) > 3 and step.optimizer.steps == 1, "skipped until it fits"
    assert scales[1] == scales[0] / 2 and scales[-1] == scales[-2]
    every = mesh["dp"].allgather_object((scales, step.grad_norm))
    assert all(one == every[0] for one in every)
    assert any((before[name] != array).any() for name, array in values(step).items())
    step.check_replicas()


def test_a_state_that_is_loaded_after_an_error_is_what_is_used(mesh: Mesh) -> None:
    """What the pass that raised had begun to fetch is older, and goes."""
    step = make("mlp", mesh, zero=3, overlap=True, bucket_mb=1e-4, lr=0.0)
    batch = KINDS["mlp"].batch(6, 0)
    for _ in range(2):  # the second knows what comes next
        step(batch)

    def fail(*_: Any) -> None:
        raise ValueError("of the user's")

    handle = step.model.layers[0].register_forward_hook(fail)
    with pytest.raises(ValueError, match="of the user's"):
        step(batch)
    handle.remove()
    step.model.load_state_dict({name: np.zeros_like(array) for name, array in values(step).items()})
    for name, parameter in step.model.named_parameters():
        assert not parameter.numpy().any(), name
    step.zero.end_pass()
