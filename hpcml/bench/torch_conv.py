"""The same convolutions and the same step of ResNet-18 in PyTorch, images channels last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hpcml.errors import UserError

try:
    import torch
    from torch import nn
except ImportError:
    raise UserError("--peer torch needs PyTorch: install hpcml[peer]") from None

if TYPE_CHECKING:
    from hpcml.bench.conv import Shape

LAST = torch.channels_last


def passes(shape: Shape, x: Any, w: Any, g: Any) -> dict[str, Callable[[], Any]]:
    """Each pass, on the same numbers; a call gives the result as an array in our order."""
    images, gradient = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, g))
    filters = torch.from_numpy(w).contiguous(memory_format=LAST)
    stride, padding = [shape.stride] * 2, [shape.kernel // 2] * 2

    def forward() -> Any:
        with torch.no_grad():
            return torch.conv2d(images, filters, None, stride, padding)

    def backward(which: int) -> Any:
        wanted = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(
            gradient, images, filters, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )[which]

    return {
        "forward": lambda: forward().permute(0, 2, 3, 1).numpy(),
        "data": lambda: backward(0).permute(0, 2, 3, 1).numpy(),
        "filter": lambda: backward(1).numpy(),
    }


class Block(nn.Module):
    """A basic block (He et al. 2016, figure 2), with torchvision's names."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = None
        if stride > 1 or channels != filters:
            shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, F, H', W')."""
        y = torch.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return torch.relu_(y)


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images; the names are those of `hpcml.models.ResNet`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for stage, (before, width) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            first = Block(before, width, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, Block(width, width, 1)))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        x = torch.relu_(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def step(
    weights: Mapping[str, Any], batch: tuple[Any, Any], classes: int, settings: dict[str, Any],
    among: bool = False,
) -> Callable[[], float]:  # fmt: skip
    """A training step that starts from the given parameters, by name.

    among: of all ranks, `batch` and the loss being this rank's; `torch.distributed` has begun.
    """
    model: Any = ResNet18(batch[0].shape[1], classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    model = model.to(memory_format=LAST)
    if among:
        model = nn.parallel.DistributedDataParallel(model)
    images = torch.from_numpy(batch[0]).contiguous(memory_format=LAST)
    target = torch.from_numpy(batch[1])
    optimizer = torch.optim.SGD(model.parameters(), **settings)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        return loss.item()  # type: ignore[no-any-return]

    return call
