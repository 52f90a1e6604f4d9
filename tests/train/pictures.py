"""Data and models of images, the user's own, that the tests of `hpcml check` and `train` run."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from tests.parallel.spatial.models import Classifier, Divided, MeshNet, Pixels

__all__ = ["Classifier", "Divided", "MeshNet", "Pixels"]


def pictures(seed: int, by_pixel: bool = False) -> Any:
    """Twelve images of 12 x 18, with a class or one for each pixel; four to validate."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(16, 1, 12, 18)).astype(np.float32)
    target = random.integers(0, 3, (16, 12, 18) if by_pixel else 16)
    samples = list(zip(images, target, strict=True))
    return samples[:12], samples[12:]


class Styled(nn.Module):
    """Makes factors and shifts of a vector that ranks have whole, among blocks and after."""

    spatial: ClassVar[dict[str, str]] = {"pool": "samples"}

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Parameter(shape=(1, 3), init=nn.Uniform(1.0))
        self.conv, self.scale = nn.Conv2d(1, 4, 3), nn.Linear(3, 4)
        self.pool, self.shift, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.scale(self.style).reshape(1, -1, 1, 1)
        return self.fc(self.pool(x.relu()).flatten(1) + self.shift(self.style))


class Blur(nn.Module):
    """Takes a block for the whole."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1)


class Mistaken(Pixels):
    """Declares that each pixel is blurred by itself."""

    spatial: ClassVar[dict[str, str]] = {**Pixels.spatial, "blur": "pointwise"}

    def __init__(self) -> None:
        super().__init__()
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x)).relu()
        return self.last(x + self.blur(x))
