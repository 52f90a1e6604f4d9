"""Small models of images and their runs: with an end of the region, or outputs of pixels."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.models import MeshNet, ResNet
from hpcml.nn.evaluation import accuracy
from hpcml.parallel import Step
from tests.parallel.cases import CLIP, Fields, decay_matrices, serial_mesh, squares, values

STEPS = 2


class Block(nn.Module):
    """Of a residual network: a stride and a shortcut."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(channels, filters, 3, 2, 1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(filters, filters, 5, padding="same", bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut, self.relu = nn.Conv2d(channels, filters, 1, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Classifier(nn.Module):
    """Stem, blocks, global pooling and a linear layer, as in He et al. 2015."""

    spatial: ClassVar[dict[str, str]] = {"avgpool": "gather"}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 3, 7, 2, 3, bias=False), nn.BatchNorm2d(3)
        self.pool, self.drop = nn.MaxPool2d(3, 2, 1), nn.Dropout(0.2)
        self.block = Block(3, 4)
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.norm, self.late = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.pool(self.bn(self.stem(x)).relu()))
        x = self.flatten(self.avgpool(self.block(x)))
        return self.fc(self.late(self.norm(x)))


class Divided(Classifier):
    """After the pooling, ranks divide the samples."""

    spatial: ClassVar[dict[str, str]] = {"avgpool": "samples"}


class Deep(Classifier):
    """The last block is computed of whole images."""

    spatial: ClassVar[dict[str, str]] = {"block": "samples"}


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(shape=(channels, 1, 1), init=nn.Uniform(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Pixels(nn.Module):
    """Down and up again, an output for each pixel."""

    spatial: ClassVar[dict[str, str]] = {"scale": "pointwise"}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(1, 4, 3, 1, 2, 2, bias=False), nn.BatchNorm2d(4)
        self.down, self.scale = nn.Conv2d(4, 5, 3, 2, 1), Scale(5)
        self.up, self.pool = nn.ConvTranspose2d(5, 4, 2, 2), nn.AvgPool2d(3, 1, 1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x)).relu()
        y = self.up(self.scale(self.down(x)).relu())
        return self.last(x[:, :, : y.shape[2], : y.shape[3]] + self.pool(y))


class Volume(nn.Module):
    """In three dimensions."""

    spatial: ClassVar[dict[str, str]] = {"head": "gather"}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, (3, 5, 1), (1, 2, 2), (1, 2, 0), bias=False)
        self.bn = nn.BatchNorm3d(2)
        self.next, self.pool = nn.Conv3d(2, 3, 3, 1, 2, 2), nn.MaxPool3d(2, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.next(self.bn(self.conv(x)).relu())))


def classes(step: int, size: int = 5) -> Fields:
    random = np.random.default_rng([4, step])
    return random.normal(size=(size, 1, 37, 42)), random.integers(0, 3, size)


def ignored(step: int, size: int = 5) -> Fields:
    """Of the first samples, which one rank has, no target counts."""
    images, target = classes(step, size)
    target[:2] = -100
    return images, target


def pixels(step: int, size: int = 5) -> Fields:
    random = np.random.default_rng([5, step])
    target = random.integers(0, 3, (size, 14, 18))
    target[random.uniform(size=target.shape) < 0.2] = -100
    return random.normal(size=(size, 1, 14, 18)), target


def heights(step: int, size: int = 5) -> Fields:
    random = np.random.default_rng([6, step])
    return random.normal(size=(size, 1, 14, 18)), random.normal(size=(size, 3, 14, 18))


def volumes(step: int, size: int = 5) -> Fields:
    random = np.random.default_rng([7, step])
    return random.normal(size=(size, 1, 6, 11, 9)), random.integers(0, 3, size)


def voxels(step: int, size: int = 5) -> Fields:
    images, _ = volumes(step, size)
    return images, np.random.default_rng([8, step]).integers(0, 3, (size, 6, 11, 9))


CE = nn.CrossEntropyLoss()
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "classifier": (Classifier, CE, classes),
    "divided": (Divided, CE, classes),
    "ignored": (Divided, CE, ignored),
    "deep": (Deep, CE, classes),
    "pixels": (Pixels, CE, pixels),
    "heights": (Pixels, nn.MSELoss(), heights),
    "squares": (Pixels, squares, heights),
    "volume": (Volume, CE, volumes),
    "resnet": (lambda: ResNet(1, 3, width=4), CE, classes),
    "meshnet": (lambda: MeshNet(1, 3, (14, 18), (4, 5, 4), 2), CE, pixels),
    "meshnet3": (lambda: MeshNet(1, 3, (6, 11, 9), (3, 4), 1), CE, voxels),
}


def score(outputs: Tensor, target: Any) -> float:
    """Accuracy of classes; of numbers, how often the first channel has the right sign."""
    if target.ndim < outputs.ndim:
        return accuracy(outputs, target)
    return float((outputs.data[:, 0] * target.data[:, 0] > 0).mean())


def make(kind: str, mesh: Mesh, dtype: str = "float64", **options: Any) -> Step:
    model, loss, _ = MODELS[kind]
    given: dict[str, Any] = {
        "lr": 0.05,
        "momentum": 0.9,
        "seed": 3,
        "microbatch": 3,
        "grad_clip": CLIP,
        "metrics": {"accuracy": score},
        **options,
    }
    return hpcml.parallelize(
        model().to(np.dtype(dtype)), loss=loss, optimizer=hpcml.optim.SGD, mesh=mesh,
        groups=decay_matrices, **given,
    )  # fmt: skip


def run(kind: str, mesh: Mesh, **options: Any) -> tuple[Any, ...]:
    step = make(kind, mesh, **options)
    batch = MODELS[kind][2]
    losses, norms, scores = [], [], []
    for number in range(STEPS):
        losses.append(step(batch(number)))
        norms.append(step.grad_norm)
        scores.append(step.scores["accuracy"])
    measured = step.measure([batch(9)])
    scores.append(measured["accuracy"])
    return losses, norms, values(step), measured["loss"], step.predict(batch(8)[0]), scores


@cache
def reference(kind: str, dtype: str = "float64") -> tuple[Any, ...]:
    return run(kind, serial_mesh(), dtype=dtype)


def same(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    """Losses, norms, parameters, validation and outputs are those of one rank."""
    exact = options.get("dtype", "float64") == "float64"
    expected = reference(kind, options.get("dtype", "float64"))
    found = run(kind, Mesh(**layout), **options)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12 if exact else 1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12 if exact else 1e-4)
    assert found[2].keys() == expected[2].keys()
    for name, array in expected[2].items():
        limit = (1e-12 if exact else 1e-4) * np.abs(array).max()
        np.testing.assert_allclose(found[2][name], array, rtol=0, atol=limit, err_msg=name)
    limit = 1e-6 if exact else 1e-3  # running estimates are of float32
    np.testing.assert_allclose(found[3], expected[3], rtol=limit)
    np.testing.assert_allclose(found[4], expected[4], rtol=0, atol=limit)
    np.testing.assert_allclose(found[5], expected[5], rtol=1e-12 if exact else 0.1)
