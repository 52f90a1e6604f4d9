"""ResNet and MeshNet in PyTorch, the former by torchvision's names: what ours are held against."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
F, nn = torch.nn.functional, torch.nn


class Block(nn.Module):
    """A basic block, or with `bottleneck` that of ResNet-50."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        shapes = (
            [(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
            if bottleneck
            else [(channels, width, 3, stride), (width, width, 3, 1)]
        )
        self.count = len(shapes)
        for number, (before, after, kernel, step) in enumerate(shapes, 1):
            conv = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(after))
        self.downsample = None
        if stride != 1 or channels != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Any) -> Any:
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = F.relu(y) if number < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class PeerResNet(nn.Module):
    def __init__(
        self, channels: int, classes: int, depth: int, width: int, small_images: bool
    ) -> None:
        super().__init__()
        counts, bottleneck = {
            18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True),
        }[depth]  # fmt: skip
        self.small = small_images
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        before, grown = width, 4 if bottleneck else 1
        for stage, count in enumerate(counts):
            blocks = []
            for number in range(count):
                step = 2 if stage and not number else 1
                blocks.append(Block(before, width * 2**stage, step, bottleneck))
                before = width * 2**stage * grown
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class PeerMeshNet(nn.Module):
    """For images whose sizes are multiples of 2^(blocks - 1)."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], convs: int) -> None:
        super().__init__()
        layers, before = [], channels
        for number, width in enumerate(widths):
            for inner in range(convs):
                kernel = 3 if number or inner else 5
                stride = 1 if inner or number + 1 == len(widths) else 2
                conv = nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False)
                layers += [nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())]
                before = width
        factor = 2 ** (len(widths) - 1)
        self.blocks = nn.Sequential(*layers)
        self.predict = nn.Conv2d(before, classes * factor**2, 1)
        self.pixels = nn.PixelShuffle(factor)

    def forward(self, x: Any) -> Any:
        return self.pixels(self.predict(self.blocks(x)))
