"""Images with a class, or a class for every pixel (`data.kind = "images"`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.data.core import Data
from hpcml.data.files import unreadable
from hpcml.data.images import arrays, folder
from hpcml.data.images.augment import Augmentation
from hpcml.data.images.bundled import BUNDLED
from hpcml.data.images.dataset import Images, measure
from hpcml.data.images.source import Source
from hpcml.errors import UserError
from hpcml.nn.evaluation import accuracy

__all__ = ["Images", "images"]


def images(
    seed: int,
    path: str = "digits",
    labels: str = "",
    axes: str = "",
    num_classes: int = 0,
    val_fraction: float = 0.1,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    flip: bool = False,
    shift: int = 0,
    rotate: float = 0.0,
) -> Data:
    """Images and their labels, the last part kept for validation.

    path: "digits" or "photographs", which come with scikit-learn; a file of images (idx, .npy,
    .npz); a folder with idx files; or a folder with a folder of PNG or JPEG files for each class.
    labels: the file of the labels, (N,) or (N, *S), if it is not found beside that of the images.
    axes: what the dimensions of arrays are (NHW, NCHW, NCDHW if not said). num_classes: 0 for one
    more than the largest label. mean, std: of each channel, which normalise; by default those of
    the training part. Augmentation of training samples: see `Augmentation`.

    Offers models `in_channels`, `num_classes`, `size`, and `in_features` and `out_features`. Raises
    UserError, naming the file, for what cannot be read or does not fit together.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} must be at least 0 and below 1")
    if shift < 0 or not 0 <= rotate <= 180:
        raise UserError(f"data.shift={shift} must be 0 or more, data.rotate={rotate} 0 to 180")
    source = find(path, labels, axes)
    count, channels, *size = source.pictures.shape
    if shift >= min(size):
        raise UserError(f"data.shift={shift} moves images of {size} pixels out of sight: lower it")
    kept = int(count * val_fraction)
    if val_fraction and not kept:
        raise UserError(
            f"data.val_fraction={val_fraction} of {count} images is none: set it to 0, or give more"
        )
    classes = source.count_classes(num_classes)
    normal = _normal(source, count - kept, {"mean": mean, "std": std})
    moved = Augmentation(seed, flip, shift, rotate) if flip or shift or rotate else None
    train = Images(source, 0, count - kept, *normal, classes, moved)
    val = Images(source, count - kept, kept, *normal, classes) if kept else None
    info = {
        "in_channels": channels, "num_classes": classes, "size": tuple(size),
        "in_features": int(np.prod([channels, *size])), "out_features": classes,
        "mean": tuple(normal[0].tolist()), "std": tuple(normal[1].tolist()),
        "classes": source.classes,
    }  # fmt: skip
    return Data(train, val, info, "cross_entropy", metrics={"accuracy": accuracy})


def find(path: str, labels: str, axes: str) -> Source:
    """The images and labels that `data.path` and `data.labels` name; raises UserError."""
    if path in BUNDLED:
        return BUNDLED[path]()
    place = Path(path).expanduser()
    try:
        is_folder = place.is_dir()
        files = sorted(one for one in place.glob("*images*idx*")) if is_folder else [place]
        exists = is_folder or place.exists()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise unreadable(path, error) from None
    if not exists:
        raise UserError(
            f'data.path="{path}" does not exist: give a file of images, a folder, or one of '
            f"{', '.join(BUNDLED)}"
        )
    if not files:
        return folder.load(place)
    if len(files) > 1:
        names = ", ".join(one.name for one in files)
        raise UserError(f'data.path="{path}" has the images {names}: name one of them')
    return arrays.load(files[0], labels, axes)


def _normal(source: Source, count: int, given: dict[str, Any]) -> tuple[Array, Array]:
    """Mean and deviation of each channel, given (one for all, or one each) or measured."""
    channels = source.pictures.shape[1]
    found = []
    for name, values in given.items():
        if len(values) not in (0, 1, channels):
            raise UserError(
                f"data.{name}={list(values)}: give a number for each of {channels} channels, or one"
            )
        found.append(np.broadcast_to(np.array(values, np.float32), channels) if values else None)
    mean, std = found
    if std is not None and not std.min() > 0:
        raise UserError(f"data.std={list(given['std'])} must be above 0")
    if mean is None or std is None:
        measured = measure(source, count)
        mean, std = (a if b is None else b for a, b in zip(measured, (mean, std), strict=True))
    return mean, std
