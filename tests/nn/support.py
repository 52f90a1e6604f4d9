"""A small model, of our layers or of PyTorch's."""

from __future__ import annotations

from typing import Any


def network(library: Any) -> Any:
    return library.Sequential(
        library.Embedding(7, 4),
        library.ModuleList([library.Linear(4, 4), library.LayerNorm(4)]),
        library.Sequential(library.Linear(4, 2), library.GELU()),
    )


def image_network(library: Any) -> Any:
    """One of each kind of layer for images."""
    return library.Sequential(
        library.Conv2d(3, 5, 3, padding=1, bias=False),
        library.BatchNorm2d(5),
        library.ReLU(),
        library.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
        library.GELU(),
        library.ConvTranspose2d(6, 6, 2, stride=2),
        library.MaxPool2d(3, 2, 1),
        library.Upsample(scale_factor=1.5, mode="bilinear"),
        library.AvgPool2d(2, 1),
        library.AdaptiveAvgPool2d(2),
        library.Flatten(),
        library.Linear(24, 4),
    )
