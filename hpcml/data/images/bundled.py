"""Images that come with scikit-learn: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml.data.images.source import InArray, Source
from hpcml.errors import UserError

TILE = (61, 64)
"""Pixels of a tile; 7 x 10 of them make a photograph."""


def digits() -> Source:
    """1,797 handwritten digits of 8 x 8 pixels (UCI's test set, Alpaydin and Kaynak 1998)."""
    found = _datasets().load_digits()
    images = found.images.astype(np.uint8)[:, None]
    return Source(InArray(images), found.target, ("digits", "digits"))


def photographs() -> Source:
    """140 tiles of two photographs, of a temple and of a flower, which are the classes."""
    try:
        photos = np.stack(_datasets().load_sample_images().images)
    except ImportError:
        raise UserError(
            'data.path="photographs" needs Pillow, which is not installed: install hpcml[images]'
        ) from None
    height, width = TILE
    count, rows, columns, channels = photos.shape
    tiles = photos.reshape(count, rows // height, height, columns // width, width, channels)
    # tile by tile of both, so that every part of the data has as many of each
    tiles = tiles.transpose(1, 3, 0, 5, 2, 4).reshape(-1, channels, height, width)
    labels = np.arange(len(tiles)) % count
    return Source(InArray(tiles), labels, ("photographs",) * 2, ("temple", "flower"))


BUNDLED = {"digits": digits, "photographs": photographs}
"""By what `data.path` calls them."""


def _datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError(
            "these images come with scikit-learn, which is not installed: install hpcml[images], "
            "or set data.path to images of your own"
        ) from None
    return datasets
