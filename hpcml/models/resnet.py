"""ResNet (He et al. 2016, "Deep residual learning for image recognition"), by torchvision's names.

The variant with the stride of a bottleneck in its 3x3 convolution (torchvision's, "v1.5").
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Linear,
    MaxPool2d,
    Module,
    Normal,
    ReLU,
    Sequential,
)


def _conv(channels: int, filters: int, kernel: int, stride: int = 1) -> Conv2d:
    """A convolution that keeps sizes but for its stride, with He's first values (fan out)."""
    made = Conv2d(channels, filters, kernel, stride, padding=kernel // 2, bias=False)
    made.weight.init = Normal(math.sqrt(2 / (filters * kernel**2)))
    return made


class _Block(Module):
    """A residual connection around some convolutions: (N, C, H, W) -> (N, F, H', W')."""

    expansion: ClassVar[int]
    """Channels of the output, in widths of the block."""
    splits: ClassVar[dict[str, str]]
    """How tensor-parallel ranks divide it: filters of a convolution, then channels of the next."""

    downsample: Sequential | None

    def _connect(self, channels: int, width: int, stride: int) -> None:
        """Make the connection: a projection where the shape changes (option B of the paper)."""
        filters = width * self.expansion
        self.relu = ReLU()
        self.downsample = None
        if stride != 1 or channels != filters:
            self.downsample = Sequential(_conv(channels, filters, 1, stride), BatchNorm2d(filters))

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        x = x if self.downsample is None else self.downsample(x)
        return self.relu(y + x)  # type: ignore[no-any-return]


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    expansion = 1
    splits: ClassVar[dict[str, str]] = {"conv1": "column", "bn1": "divided", "conv2": "row"}

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm2d(width)
        self._connect(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, width, H', W')."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self._add(x, self.bn2(self.conv2(y)))


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions, the last with four times as many filters."""

    expansion = 4
    splits: ClassVar[dict[str, str]] = {"conv2": "column", "bn2": "divided", "conv3": "row"}

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 1)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = BatchNorm2d(width * self.expansion)
        self._connect(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 width, H', W')."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self._add(x, self.bn3(self.conv3(y)))


_BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
"""By depth, the kind of block and how many of them the four stages have (table 1 of the paper)."""


class ResNet(Module):
    """Classifier of images: (N, in_channels, H, W) -> logits (N, num_classes).

    depth: 18, 34 or 50. width: channels of the first stage; every stage doubles them. small_images:
    begin with a 3x3 convolution of stride 1 and no pooling, as the paper does for images of 32 x 32
    (section 4.2), instead of a 7x7 one of stride 2 and pooling. A state dict of torchvision's
    resnet18, resnet34 or resnet50 loads as it is.
    """

    chain = ("conv1", "bn1", "relu", "maxpool", "layer1.*", "layer2.*", "layer3.*", "layer4.*",
             "avgpool", "flatten", "fc")  # fmt: skip
    """What forward calls one after the other: a pipeline may be cut between any two."""
    spatial: ClassVar[dict[str, str]] = {"avgpool": "gather"}
    """Where ranks that divide images come together."""
    units = ("layer?.*",)
    """What ZeRO stage 3 gathers at once, beside the other layers."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        depth: int = 18,
        width: int = 64,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise UserError(f"depth={depth} of a ResNet: use one of {', '.join(map(str, _BLOCKS))}")
        block, counts = _BLOCKS[depth]
        self.conv1 = (
            _conv(in_channels, width, 3) if small_images else _conv(in_channels, width, 7, 2)
        )
        self.bn1 = BatchNorm2d(width)
        self.relu = ReLU()
        self.maxpool = Sequential() if small_images else MaxPool2d(3, 2, 1)
        widths = [width * 2**stage for stage in range(4)]
        channels = [width, *(n * block.expansion for n in widths)]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(block, before, n, count, 1 if n == width else 2)
            for (before, _), n, count in zip(pairwise(channels), widths, counts, strict=True)
        )
        self.splits = {f"layer?.*.{name}": style for name, style in block.splits.items()}
        self.avgpool = AdaptiveAvgPool2d(1)
        self.fc = Linear(channels[-1], num_classes)

    def flatten(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1) -> (N, C)."""
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))  # type: ignore[no-any-return]


def _stage(
    block: type[BasicBlock | Bottleneck], channels: int, width: int, count: int, stride: int
) -> Sequential:
    """Blocks of one width, the first of which changes the shape."""
    rest = [block(width * block.expansion, width, 1) for _ in range(count - 1)]
    return Sequential(block(channels, width, stride), *rest)
