"""ResNet and MeshNet on divided images: losses, gradients and parameters of one rank, in two types.

In fp32 that holds where no activation lies so close to the kink of a ReLU that rounding moves it to
the other side, which changes a gradient by what this pixel has of it (docs/spatial.md). The data
here are such that it holds with any order of sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.models import MeshNet, ResNet
from tests.parallel.cases import name_of, ranks_of, serial_mesh

cases = pytest.mark.parametrize
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}
KINK = 1e-5
"""Ten times what rounding makes of an activation in fp32, and less than the nearest here."""
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet": (lambda: ResNet(1, 3, width=2, small_images=True), (17, 25)),
    "meshnet": (lambda: MeshNet(1, 3, (17, 25), (3, 4), 1), (17, 25)),
    "meshnet3": (lambda: MeshNet(1, 3, (5, 7, 9), (2, 3), 1), (5, 7, 9)),
}
FP32 = "float32"
WAYS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("resnet", {"sp_h": 2}, {"dtype": FP32, "zero": 2}),
    ("resnet", {"sp_w": 3}, {"dtype": FP32, "zero": 1}),
    ("resnet", {"sp_h": 2, "sp_w": 2}, {"dtype": FP32}),
    ("resnet", {"dp": 2, "sp_w": 2}, {"dtype": FP32, "zero": 3}),
    ("resnet", {"sp_w": 3}, {}),
    ("resnet", {"sp_w": 4}, {"zero": 1}),
    ("resnet", {"dp": 2, "sp_h": 2}, {"zero": 3}),
    ("meshnet", {"sp_w": 2}, {"dtype": FP32}),
    ("meshnet", {"sp_w": 3}, {"dtype": FP32, "zero": 3}),
    ("meshnet", {"sp_h": 2, "sp_w": 2}, {"dtype": FP32}),
    ("meshnet", {"dp": 2, "sp_h": 2}, {"dtype": FP32, "zero": 1}),
    ("meshnet", {"sp_w": 4}, {"zero": 2}),
    ("meshnet", {"sp_h": 2, "sp_w": 2}, {}),
    ("meshnet3", {"sp_d": 2, "sp_w": 2}, {"dtype": FP32, "zero": 1}),
]
Trained = tuple[list[float], dict[str, Any], dict[str, Any]]


def trained(kind: str, mesh: Mesh, dtype: str = "float64", **options: Any) -> Trained:
    """Losses of two steps, the gradients of the second, and parameters after it."""
    make, sizes = KINDS[kind]
    model = make().to(np.dtype(dtype))
    nearest = [np.inf]
    if dtype == "float64" and mesh.size == 1:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_pre_hook(
                    lambda _, given: nearest.append(np.abs(given[0].data).min())
                )
    step = hpcml.parallelize(
        model, loss=nn.CrossEntropyLoss(), optimizer=hpcml.optim.SGD, lr=0.05, momentum=0.9,
        mesh=mesh, seed=5, microbatch=2, **options,
    )  # fmt: skip
    losses = []
    for number in range(2):
        random = np.random.default_rng([len(sizes), number])
        x = random.normal(size=(3, 1, *sizes)).astype(dtype)
        losses.append(step((x, random.integers(0, 3, 3 if kind == "resnet" else (3, *sizes)))))
    assert min(nearest) > KINK, min(nearest)
    copied = [{name: np.array(a) for name, a in found}
              for found in (step.gathered_gradients(), step.gathered())]  # fmt: skip
    return losses, copied[0], copied[1]


@cache
def alone(kind: str, dtype: str) -> Trained:
    return trained(kind, serial_mesh(), dtype)


@cases(("kind", "layout", "options"), WAYS, ids=name_of)
def test_training_is_that_of_one_rank(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    alone(kind, "float64")  # which looks at the activations
    dtype = options.get("dtype", "float64")
    expected, limit = alone(kind, dtype), TOLERANCE[dtype]
    for found in on_threads(
        lambda: trained(kind, Mesh(**layout), **options), ranks=ranks_of(layout)
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=limit)
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert ours.keys() == theirs.keys()
            for name, array in theirs.items():
                atol = limit * np.abs(array).max()
                np.testing.assert_allclose(ours[name], array, rtol=0, atol=atol, err_msg=name)
