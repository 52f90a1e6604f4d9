"""The network of the mesh-tangling problem: a class for every pixel of a large image or volume.

Dryden et al. 2019, "Improving strong-scaling of CNN training by exploiting finer-grained
parallelism", section VI: meshes of a simulation as images with the state of each cell in its
channels; to be told are the cells that will tangle. Blocks of convolutions, the first of each
halving the resolution, and at the end one of 1x1 that tells all pixels of its place at once. That
end, and where resolution falls, are from the authors' configurations for LBANN (its repository,
model_zoo/models/mesh: for 1024 x 1024 pixels of 18 channels, widths of 256, 384, 512, 384, 384 and
128, and 5 convolutions a block).
"""

from __future__ import annotations

import math
from itertools import pairwise

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import (
    BatchNorm2d,
    BatchNorm3d,
    Conv2d,
    Conv3d,
    Module,
    Normal,
    PixelShuffle,
    ReLU,
    Sequential,
)

_CONV = {2: Conv2d, 3: Conv3d}
_NORM = {2: BatchNorm2d, 3: BatchNorm3d}


class ConvBlock(Module):
    """Convolution, batch norm and ReLU: (N, channels, *S) -> (N, filters, *S / stride)."""

    def __init__(self, dims: int, channels: int, filters: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = _CONV[dims](channels, filters, kernel, stride, padding=kernel // 2, bias=False)
        self.conv.weight.init = Normal(math.sqrt(2 / (channels * kernel**dims)))
        self.bn = _NORM[dims](filters)
        self.relu = ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, *S) -> (N, filters, *S')."""
        return self.relu(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class MeshNet(Module):
    """Segmentation: (N, in_channels, *size) -> logits of every pixel (N, num_classes, *size).

    size: (H, W) or (D, H, W), at least the number of pixels at a place of the last block, 2^(blocks
    - 1) along each dimension. widths: channels of the blocks; all but the last halve the
    resolution. convs: convolutions of a block. Raises UserError for images that are too small.
    """

    chain = ("blocks.*", "predict", "pixels")
    """What forward calls one after the other: a pipeline may be cut between any two."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        size: tuple[int, ...],
        widths: tuple[int, ...] = (16, 32, 32, 16),
        convs: int = 3,
    ) -> None:
        super().__init__()
        dims, factor = len(size), 2 ** (len(widths) - 1)
        if dims not in _CONV or not widths or min(widths) < 1 or convs < 1:
            raise UserError(
                f"MeshNet: size={size}, widths={widths}, convs={convs}: images have 2 or 3 "
                "dimensions, and there must be at least one block of one convolution"
            )
        if min(size) < factor:
            raise UserError(
                f"MeshNet: an image of {' x '.join(map(str, size))} is smaller than the {factor} "
                f"pixels along each dimension that {len(widths)} blocks make one place of: take "
                "larger images, or fewer model.widths"
            )
        blocks: list[Module] = []
        for number, (channels, width) in enumerate(pairwise((in_channels, *widths))):
            kernel, stride = 3 if number else 5, 2 if number + 1 < len(widths) else 1
            first = ConvBlock(dims, channels, width, kernel, stride)
            blocks += [first, *(ConvBlock(dims, width, width, 3, 1) for _ in range(convs - 1))]
        self.blocks = Sequential(*blocks)
        self.predict = _CONV[dims](widths[-1], num_classes * factor**dims, 1)
        self.pixels = PixelShuffle(factor, size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) -> logits (N, num_classes, *size)."""
        return self.pixels(self.predict(self.blocks(x)))  # type: ignore[no-any-return]
