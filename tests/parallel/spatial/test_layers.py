"""Each layer on blocks of images, beside the same layer of the whole: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpcml import nn
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.parallel.spatial.overlap import Overlap
from tests.parallel.cases import name_of, ranks_of
from tests.parallel.spatial.support import compare_layer

cases = pytest.mark.parametrize
Make = Callable[[], nn.Module]


def conv(kernel: int, stride: int = 1, padding: Any = 0, dilation: int = 1, **more: Any) -> Make:
    return lambda: nn.Conv2d(2, 4, kernel, stride, padding, dilation, **more)


IMAGE = (2, 2, 13, 17)
LAYERS: dict[str, Make] = {
    "1x1": conv(1),
    "1x1 stride 2": conv(1, 2),
    "3x3": conv(3, 1, 1),
    "3x3 unpadded": conv(3),
    "3x3 stride 2": conv(3, 2, 1),
    "3x3 dilation 2": conv(3, 1, 2, 2),
    "5x5 stride 2": conv(5, 2, 2),
    "5x5 dilation 2 stride 2": conv(5, 2, 3, 2),
    "7x7 stride 2": conv(7, 2, 3),
    "7x7 same": conv(7, padding="same"),
    "4x4 same, groups": conv(4, padding="same", groups=2),
    "7x7 unpadded": conv(7, bias=False),
    "circular": conv(5, 1, 3, padding_mode="circular"),
    "reflect": conv(5, 2, 2, padding_mode="reflect"),
    "replicate": conv(3, 1, 3, 2, padding_mode="replicate"),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, 1),
    "transposed, gaps": lambda: nn.ConvTranspose2d(2, 3, 2, 3),
    "transposed, dilation": lambda: nn.ConvTranspose2d(2, 4, 3, 1, 2, groups=2, dilation=2),
    "max 2": lambda: nn.MaxPool2d(2),
    "max 3 stride 2": lambda: nn.MaxPool2d(3, 2, 1),
    "max ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "average 3": lambda: nn.AvgPool2d(3, 2, 1),
    "average, edges": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "average, ceil": lambda: nn.AvgPool2d((2, 3), 2, ceil_mode=True),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((5, 6)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest, odd": lambda: nn.Upsample((7, 29)),
    "bilinear": lambda: nn.Upsample(scale_factor=1.7, mode="bilinear"),
    "bilinear, corners": lambda: nn.Upsample((9, 31), mode="bilinear", align_corners=True),
    "pixels": lambda: nn.Sequential(nn.Conv2d(2, 18, 1), nn.PixelShuffle(3, (37, 50))),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm, mean": lambda: nn.BatchNorm2d(2, momentum=None, affine=False),
    "dropout": lambda: nn.Dropout(0.4),
}
OVERLAPPED = ["3x3", "3x3 unpadded", "3x3 stride 2", "3x3 dilation 2", "5x5 stride 2", "7x7 same",
              "4x4 same, groups"]  # fmt: skip
"""Convolutions of which every rank has an interior."""
GRIDS = [{"sp_w": 3}, {"sp_h": 2, "sp_w": 2}]


@cases("grid", GRIDS, ids=name_of)
@cases("layer", LAYERS)
def test_layers(layer: str, grid: dict[str, int]) -> None:
    on_threads(lambda: compare_layer(LAYERS[layer], Mesh(**grid), IMAGE), ranks=ranks_of(grid))


@cases("grid", [{"sp_w": 2}, {"sp_h": 2, "sp_w": 2}], ids=name_of)
@cases("layer", OVERLAPPED)
def test_beside_the_exchange(layer: str, grid: dict[str, int]) -> None:
    """The same where the interior is computed while the halo travels."""

    def program() -> None:
        made = compare_layer(LAYERS[layer], Mesh(**grid), IMAGE, overlap=True)
        plans = [plan[1] for plan in made._plans.values() if isinstance(plan, tuple)]
        assert any(isinstance(plan, Overlap) for plan in plans)

    on_threads(program, ranks=ranks_of(grid))
