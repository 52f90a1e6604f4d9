"""Pictures in folders, one folder for each class, read by Pillow when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.data.files import unreadable
from hpcml.data.images.source import Source, Space
from hpcml.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY, _COLOUR = ("1", "L"), ("P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")  # Pillow's modes


class Decoded:
    """Pictures in files: (N, C, H, W) of bytes, grey if all are, else red, green and blue."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises UserError, naming the file, if one is unreadable or of another size."""
        self.files = files
        heads = [_head(file) for file in files]
        for file, (size, _) in zip(files, heads, strict=True):
            if size != heads[0][0]:
                (w, h), (width, height) = heads[0][0], size
                raise UserError(
                    f'picture "{file}" has {width} x {height} pixels, "{files[0]}" {w} x {h}: '
                    "make all pictures of one size"
                )
        width, height = heads[0][0]
        self.mode = "L" if all(mode in _GREY for _, mode in heads) else "RGB"
        self.shape = (len(files), len(self.mode), height, width)

    def part(self, index: int, space: Space) -> Array:
        """Channels and a part of the pixels; the whole picture is decoded for it."""
        file, pillow = self.files[index], _pillow()
        try:
            with pillow.open(file) as picture:
                pixels = np.asarray(picture.convert(self.mode))
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            raise _undecodable(file, error) from None
        whole = pixels.reshape(self.shape[2], self.shape[3], self.shape[1]).transpose(2, 0, 1)
        return whole[(slice(None), *space)]

    def take(self, indices: Array) -> Array:
        """Whole pictures."""
        whole = (slice(None),) * 2
        return np.stack([self.part(int(index), whole) for index in indices])


def load(folder: Path) -> Source:
    """The pictures of all folders of a folder, whose names are the classes, in sorted order.

    Samples are in such an order that every part of them has its share of each class: the i-th of n
    pictures of a class comes at place (i + 1/2) / n. Raises UserError.
    """
    try:
        classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        found = [_pictures(one) for one in classes]
    except OSError as error:
        raise unreadable(str(folder), error) from None
    for one, files in zip(classes, found, strict=True):
        if not files:
            raise UserError(f'folder "{one}" has no {", ".join(SUFFIXES)} files: remove it')
    if not classes:
        raise UserError(
            f'data.path="{folder}" has no folders: put the pictures of each class into a folder of '
            "its name there"
        )
    placed = sorted(
        ((i + 0.5) / len(files), number, file)
        for number, files in enumerate(found)
        for i, file in enumerate(files)
    )
    names = tuple(one.name for one in classes)
    labels = np.array([number for _, number, _ in placed])
    pictures = Decoded([file for *_, file in placed])
    return Source(pictures, labels, (str(folder), str(folder)), names)


def _pictures(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    for one in found:
        if not one.is_file():
            raise UserError(f'picture "{one}" is no file, or a link to none: mend or remove it')
    return found


def _head(file: Path) -> tuple[tuple[int, int], str]:
    """Width and height of a picture, and Pillow's mode; its pixels are not read."""
    pillow = _pillow()
    try:
        with pillow.open(file) as picture:
            size, mode = picture.size, picture.mode
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise _undecodable(file, error) from None
    if mode not in (*_GREY, *_COLOUR):
        raise UserError(
            f'picture "{file}" has pixels of type {mode}: convert it to 8 bits, or give arrays'
        )
    return size, mode


def _undecodable(file: Path, error: Exception) -> UserError:
    return UserError(
        f'picture "{file}" cannot be decoded ({" ".join(str(error).split())}): replace or remove it'
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError(
            "folders of pictures need Pillow, which is not installed: install hpcml[images], or "
            "give arrays"
        ) from None
    return Image
