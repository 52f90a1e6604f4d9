"""Convolutions whose filters and channels ranks divide: those of one rank, and what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh, run
from hpcml.comm.alone import Alone
from hpcml.errors import UserError
from hpcml.models import ResNet
from hpcml.models.resnet import Bottleneck
from hpcml.parallel import Step

cases = pytest.mark.parametrize
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}
CLASSES = 5


class Volumes(nn.Module):
    """One of each kind between two convolutions, in 3-D; then a pair in 1-D, of other sizes."""

    splits: ClassVar[dict[str, str]] = {
        "up": "column", "between": "divided", "down": "row", "last.0": "column", "last.2": "row",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv3d(2, 7, 3, padding=1, padding_mode="reflect")
        self.between = nn.Sequential(
            nn.BatchNorm3d(7), nn.ReLU(), nn.MaxPool3d(2, 1), nn.Conv3d(7, 7, 2, groups=7),
            nn.BatchNorm3d(7, affine=False), nn.Dropout(0.25), nn.AvgPool3d(1, 2),
        )  # fmt: skip
        self.down = nn.Conv3d(7, 5, 1)
        self.last = nn.Sequential(nn.Conv1d(5, 4, 2), nn.GELU(), nn.Conv1d(4, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.between(self.up(x)))
        return self.last(x.flatten(2)).mean(2)


def resnet() -> nn.Module:
    return ResNet(2, CLASSES, width=5, small_images=True)


class OfBottleneck(nn.Module):
    """A block of ResNet-50, whose residual connection is on every rank."""

    splits: ClassVar[dict[str, str]] = {f"block.{k}": v for k, v in Bottleneck.splits.items()}

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Bottleneck(2, 5, 2), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))


def trained(make: Callable[[], nn.Module], mesh: Mesh, kind: str, **options: Any) -> Step:
    """A step that has been made twice: 4 images of 16 x 13, or volumes."""
    model = make()
    model.to(np.dtype(kind))
    step = hpcml.parallelize(
        model, loss=nn.CrossEntropyLoss(), optimizer=hpcml.optim.SGD, lr=0.1, mesh=mesh, seed=3,
        microbatch=2, **options,
    )  # fmt: skip
    random = np.random.default_rng(1)
    sizes = (5, 4, 6) if make is Volumes else (16, 13)
    x = random.standard_normal((4, 2, *sizes)).astype(kind)
    for _ in range(2):
        step((x, random.integers(0, CLASSES, 4)))
    return step


def same_as_alone(make: Any, kind: str, axes: dict[str, int], options: dict[str, Any]) -> None:
    """Parameters and running estimates after two steps, gathered by name."""
    alone = trained(make, Mesh(Alone()), kind, grad_clip=options.get("grad_clip", 0.0))
    divided = trained(make, Mesh(**axes), kind, **options)
    held = sum(p.numel() for p in divided.model.parameters())
    assert options.get("zero") == 3 or held < sum(p.numel() for p in alone.model.parameters())
    ours = {name: array.copy() for name, array in divided.gathered()}
    for name, array in alone.gathered():
        scale = max(abs(array).max(), 0.01)  # of shifts, which begin with 0
        np.testing.assert_allclose(ours[name], array, 0, TOLERANCE[kind] * scale)
    ours = divided.gathered_buffers()
    for name, array in alone.gathered_buffers().items():
        np.testing.assert_allclose(ours[name], array, TOLERANCE[kind], TOLERANCE[kind])


@cases(
    ("make", "kind", "axes", "options"),
    [
        (resnet, "float64", {"dp": 1, "tp": 2}, {}),
        (resnet, "float64", {"dp": 1, "tp": 3}, {"zero": 3}),
        (resnet, "float64", {"dp": 2, "tp": 2}, {"zero": 1, "grad_clip": 0.5}),
        (OfBottleneck, "float64", {"dp": 1, "tp": 2}, {"partition_activations": "yes"}),
        (Volumes, "float64", {"dp": 1, "tp": 2}, {}),
        (Volumes, "float64", {"dp": 1, "tp": 3}, {}),
        (Volumes, "float32", {"dp": 1, "tp": 4}, {}),
    ],
)
def test_training_is_that_of_one_rank(make: Any, kind: str, axes: Any, options: Any) -> None:
    run(same_as_alone, make, kind, axes, options, ranks=axes["dp"] * axes["tp"])


@pytest.mark.mpi
def test_training_between_processes() -> None:
    same_as_alone(Volumes, "float64", {"dp": 1, "tp": Mesh().size}, {})


def test_a_pair_costs_two_all_reduces() -> None:
    """Of the second's output forward, of the gradient of the first's input backward."""

    def program() -> None:
        step = trained(resnet, Mesh(dp=1, tp=Mesh().size), "float32")
        before = step.mesh.ledger.snapshot()
        random = np.random.default_rng(1)
        step((random.standard_normal((2, 2, 16, 12), np.float32), np.array([0, 1])))
        sent = (step.mesh.ledger.snapshot() - before)["tp"]
        sizes = [(width, 16 // s * (12 // s)) for width, s in ((5, 1), (10, 2), (20, 4))]
        sizes.append((40, 2 * 2))  # of three rows, strides leave two
        inputs = [sizes[max(stage - 1, 0)] for stage in range(4)]  # of each stage's first block
        numbers = sum(3 * c * places for c, places in sizes) + sum(c * n for c, n in inputs)
        assert sent["all_reduce"].calls == 2 * 8 + 1  # and the norm of the gradient
        assert sent["all_reduce"].bytes == 2 * numbers * 4 + 8
        assert set(sent) == {"all_reduce"}

    run(program, ranks=2)


class Wrong(nn.Module):
    def __init__(self, splits: dict[str, str], *layers: nn.Module) -> None:
        super().__init__()
        self.splits, self.all = splits, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x).mean((2, 3))


@cases(
    ("model", "parts"),
    [
        (
            lambda: Wrong({"all.0": "column"}, nn.Conv2d(2, 4, 1, groups=2)),
            ['all.0, "column"', "groups=2", '"divided"'],
        ),
        (
            lambda: Wrong({"all.1": "divided"}, nn.Conv2d(2, 7, 1), nn.BatchNorm2d(7)),
            ['all.1, "divided" of 7 channels', "all 7 came", '"column"'],
        ),
        (
            lambda: Wrong({"all.1": "row"}, nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=4)),
            ['all.1, "row"', "groups=4"],
        ),
        (
            lambda: Wrong({"all.0": "column"}, nn.Conv2d(2, 2, 1)),
            ["all.0", "filters=2", "3 ranks"],
        ),
        (
            lambda: Wrong({"all.0": "row"}, nn.Conv2d(2, 4, 1)),
            ["all.0", "channels=2", "3 ranks"],
        ),
        (
            lambda: Wrong({"all.0": "column", "all.1": "divided"}, nn.Conv2d(2, 6, 1),
                          nn.Conv2d(6, 6, 1, groups=2)),
            ["all.1", "groups=2", "6 channels", "3 ranks"],
        ),
        (
            lambda: Wrong({"all.?": "column"}, nn.Conv2d(2, 7, 1), nn.Conv2d(7, 6, 1)),
            ['all.1, "column" of 7 channels', "a part of 7"],
        ),
        (
            lambda: Wrong({"all.0": "column"}, nn.Conv2d(2, 7, 1), nn.BatchNorm2d(7)),
            ["all.1, a BatchNorm2d of 7 features", "a part of 7"],
        ),
        (
            lambda: Wrong({"all.1": "row"}, nn.Conv2d(2, 7, 1), nn.Conv2d(7, 6, 1)),
            ['all.1, "row" of 7 channels', "all 7 came", '"column"'],
        ),
        (
            lambda: Wrong({"all.0": "column"}, nn.Conv2d(2, 6, 1)),
            ["Wrong ends with features that ranks divide"],
        ),
        (
            lambda: Wrong({"all.0": "column"}, nn.ConvTranspose2d(2, 6, 1)),
            ["all.0", "ConvTranspose2d", "a convolution"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_named(model: Any, parts: list[str]) -> None:
    def attempt() -> None:
        step = hpcml.parallelize(
            model(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, lr=0.1, mesh=Mesh(dp=1, tp=3)
        )
        step((np.ones((2, 2, 4, 4), np.float32), np.ones((2, 6), np.float32)))

    def program() -> str:
        with pytest.raises(UserError) as caught:
            attempt()
        return str(caught.value)

    said = run(program, ranks=3)
    assert said == [said[0]] * 3 and "\n" not in said[0]
    assert all(part in said[0] for part in parts), said[0]
