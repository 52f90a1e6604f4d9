"""What optimizers refuse, clipping, and optimizers of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.optim import SGD, Adam, AdamW, Optimizer, clip_scale


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(np.array(values))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (SGD, {"lr": -0.1}, ["lr=-0.1", "0 or more"]),
        (SGD, {"lr": float("nan")}, ["lr=nan"]),
        (SGD, {"momentum": -1}, ["momentum=-1"]),
        (SGD, {"weight_decay": -1}, ["weight_decay=-1"]),
        (SGD, {"nesterov": True}, ["nesterov", "momentum=0"]),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ["dampening=0.1"]),
        (Adam, {"eps": -1e-8}, ["eps=-1e-08"]),
        (Adam, {"betas": (0.9, 1.0)}, ["betas=(0.9, 1.0)", "below 1"]),
        (AdamW, {"betas": (-0.1, 0.9)}, ["betas=(-0.1, 0.9)"]),
        (AdamW, {"betas": (0.9,)}, ["betas=(0.9,)", "two"]),
    ],
)
def test_settings_that_make_no_sense(
    kind: type[Optimizer], settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        kind([parameter(1.0)], **settings)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_settings_of_a_group_are_checked_too() -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        SGD([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)], "lr": -1}])


@pytest.mark.parametrize("wrong", [[], [{"params": []}], iter(())])
def test_no_parameters(wrong: Any) -> None:
    with pytest.raises(ValueError, match="SGD"):
        SGD(wrong)


def test_all_frozen() -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        SGD(nn.Linear(2, 2).requires_grad_(False).parameters())


@pytest.mark.parametrize(
    "wrong", [[Tensor([1.0])], [("weight", parameter(1.0))], [{"lr": 1.0}], [3]], ids=repr
)
def test_what_is_no_parameter(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"SGD takes|an optimizer takes"):
        SGD(wrong)


def test_the_same_parameter_twice() -> None:
    weight = parameter(1.0)
    weight.name = "layer.weight"
    with pytest.raises(ValueError, match=r"layer\.weight is given twice"):
        SGD([weight, weight])
    with pytest.raises(ValueError, match=r"layer\.weight is given twice"):
        SGD([{"params": [weight]}, {"params": [weight]}])


def test_a_single_parameter_as_a_group() -> None:
    weight = parameter(1.0)
    assert SGD([{"params": weight}]).storage.parameters == [weight]


def test_clip_scale() -> None:
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25)
    assert clip_scale(1e30, 0.0) == 1.0, "0 means no limit"


def test_scale_counts_in_every_optimizer() -> None:
    for kind in (SGD, lambda p, lr: SGD(p, lr, momentum=0.9), Adam, AdamW):
        halved, small = parameter(1.0, 2.0), parameter(1.0, 2.0)
        first, second = kind([halved], lr=0.1), kind([small], lr=0.1)
        for _ in range(3):
            halved.grad, small.grad = Tensor(np.array([3.0, -1.0])), Tensor(np.array([1.5, -0.5]))
            first.step(0.5)
            second.step()
        np.testing.assert_array_equal(halved.numpy(), small.numpy())
        assert not np.array_equal(halved.numpy(), [1.0, 2.0])


class SignDescent(Optimizer):
    """One's own: a step of fixed length against the sign, with a count of its steps as state."""

    states = ("count",)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, group: Any, data: Any, grad: Any, state: Any, scale: float) -> None:
        data -= group["lr"] * np.sign(grad)
        state["count"] += 1


def test_an_optimizer_of_ones_own() -> None:
    a, b = parameter(1.0, 2.0), parameter(5.0)
    made = SignDescent([{"params": [a]}, {"params": [b], "lr": 1.0}])
    for _ in range(2):
        made.zero_grad()
        (((a * Tensor(np.array([3.0, -3.0]))).sum() - b) * 1.0).sum().backward()
        made.step()
    np.testing.assert_allclose(a.numpy(), [0.8, 2.2])
    np.testing.assert_allclose(b.numpy(), [7.0])
    assert made.state["count"][0] == 2 and made.steps == 2


def test_an_optimizer_without_update_says_so() -> None:
    with pytest.raises(TypeError, match="Optimizer defines no update"):
        Optimizer([parameter(1.0)], {}).step()


def test_state_is_allocated_only_where_it_is_used() -> None:
    assert SGD([parameter(1.0)], 0.1).state == {}
    assert set(SGD([parameter(1.0)], 0.1, momentum=0.9).state) == {"momentum_buffer"}
    assert set(AdamW([parameter(1.0)]).state) == {"exp_avg", "exp_avg_sq"}


def test_settings_of_another_time_hold_for_a_while() -> None:
    """For an update that comes late; then those of now are back."""
    first, second = parameter(1.0), parameter(1.0)
    optimizer = SGD([{"params": [first], "lr": 0.5}, {"params": [second]}], lr=0.25)
    then = optimizer.settings()
    assert [sorted(settings)[:2] for settings in then] == [["dampening", "lr"]] * 2
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    with optimizer.using(then):
        (first + second).sum().backward()
        optimizer.step()
    assert (first.numpy(), second.numpy()) == (0.5, 0.75)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert optimizer.param_groups[0]["params"] == [first]
