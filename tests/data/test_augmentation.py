"""Moved images: what a move does, and that a sample's is the same wherever it is computed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hpcml.data import Batches
from hpcml.data.batches import Batch
from hpcml.data.images import images
from hpcml.data.images.augment import Augmentation, Move
from tests.data.pictures import bytes_of, write_pair

IMAGE = bytes_of(1, (5, 6))[0]


def moved(
    image: np.ndarray, mirrored: bool = False, shift: tuple[int, ...] = (0, 0), angle: float = 0.0,
    nearest: bool = False,
) -> np.ndarray:  # fmt: skip
    """All of a moved image."""
    size = image.shape[-len(shift) :]
    space = tuple(slice(0, n) for n in size)
    move = Move(size, mirrored, shift, angle)
    return move.part(lambda part: image[(..., *part)], space, nearest=nearest)


def test_mirrored_and_shifted() -> None:
    np.testing.assert_array_equal(moved(IMAGE, True), IMAGE[..., ::-1])
    down = moved(IMAGE, shift=(2, -1))  # a crop from the image with a border of zeros
    padded = np.pad(IMAGE, ((0, 0), (2, 2), (1, 1)))
    np.testing.assert_array_equal(down, padded[:, 0:5, 2:8])
    np.testing.assert_array_equal(moved(IMAGE, True, (2, -1)), padded[:, 0:5, 5::-1][..., :6])


@pytest.mark.parametrize("nearest", [True, False])
def test_turned(nearest: bool) -> None:
    """A quarter exactly, and by linear interpolation what a linear image has there."""
    square = bytes_of(1, (5, 5))[0]
    quarter = moved(square, angle=math.pi / 2, nearest=nearest)
    np.testing.assert_allclose(quarter, np.rot90(square, -1, (1, 2)), atol=1e-4)
    y, x = np.mgrid[0:9, 0:9].astype(np.float64)
    angle = 0.2
    turned = moved((3 * y + 2 * x)[None], angle=angle, nearest=nearest)[0]
    down, right = y - 4, x - 4
    source = (np.cos(angle) * down - np.sin(angle) * right + 4,
              np.sin(angle) * down + np.cos(angle) * right + 4)  # fmt: skip
    within = slice(2, 7), slice(2, 7)
    expected = 3 * source[0] + 2 * source[1]
    off = np.abs(turned - expected)[within].max()
    assert off <= 2.5 if nearest else off < 1e-5


@pytest.mark.parametrize("size", [(9, 7), (4, 6, 5)], ids=str)
@pytest.mark.parametrize("how", [{"flip": True, "shift": 2}, {"rotate": 25.0, "shift": 3}], ids=str)
def test_a_part_is_that_of_the_whole(tmp_path: Path, size: tuple[int, ...], how: dict) -> None:
    """To the bit, for images and the labels of their pixels, wherever the part lies."""
    given = bytes_of(6, size)
    path = write_pair(tmp_path, given, given[:, 0] % 3)
    batch = Batch(images(1, str(path), val_fraction=0, **how).train, np.arange(6), first=40)
    x, y = batch[:]
    assert not np.array_equal(x, images(1, str(path), val_fraction=0).train[0][0])
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in size]
    for corner in np.ndindex(*[2] * len(size)):
        space = tuple(pair[i] for pair, i in zip(halves, corner, strict=True))
        cut, labels = batch.part(slice(2, 6), space)
        np.testing.assert_array_equal(cut, x[(slice(2, 6), slice(None), *space)])
        np.testing.assert_array_equal(labels, y[(slice(2, 6), *space)])


def test_labels_of_pixels_move_along(tmp_path: Path) -> None:
    """Pixels that a move takes from the image keep their label; others are of class 0."""
    given = bytes_of(8, (6, 6), 1)
    path = write_pair(tmp_path, given, given[:, 0])
    how = {"flip": True, "shift": 2, "mean": (0.0,), "std": (1.0,)}
    x, y = next(iter(Batches(images(0, str(path), val_fraction=0, **how).train, 8, 0)))[:]
    np.testing.assert_array_equal(x[:, 0], y)


def test_a_sample_depends_on_its_number_in_the_run(tmp_path: Path) -> None:
    """Not on the batch it is in, nor on what is asked for at once; each epoch anew."""
    path = write_pair(tmp_path, bytes_of(6), np.arange(6) % 2)
    train = images(3, str(path), val_fraction=0, flip=True, shift=1, rotate=10.0).train
    x, _ = Batch(train, np.array([0, 1, 2, 3, 0, 1]), first=10)[:]
    other = Batch(train, np.array([2, 3, 0]), first=12)
    np.testing.assert_array_equal(other[:][0], x[2:5])
    np.testing.assert_array_equal(other[1:2][0], x[3:4])
    assert not np.array_equal(x[0], x[4])
    again = images(4, str(path), val_fraction=0, flip=True, shift=1, rotate=10.0).train
    assert not np.array_equal(Batch(again, np.arange(4), first=10)[:][0], x[:4])


def test_validation_is_not_augmented(tmp_path: Path) -> None:
    path = write_pair(tmp_path, bytes_of(10), np.arange(10) % 2)
    plain = images(0, str(path), val_fraction=0.5).val
    shifted = images(0, str(path), val_fraction=0.5, shift=2, flip=True).val
    for one, other in zip(plain, shifted, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_moves_are_spread_over_what_is_allowed() -> None:
    augmentation = Augmentation(0, flip=True, shift=2, rotate=15.0)
    moves = [augmentation.move(number, (8, 8)) for number in range(400)]
    assert 150 < sum(move.mirrored for move in moves) < 250
    for dim in range(2):
        counts = np.bincount([move.shift[dim] + 2 for move in moves], minlength=5)
        assert len(counts) == 5 and counts.min() > 50
    angles = np.degrees([move.angle for move in moves])
    assert -15 <= angles.min() < -13 and 13 < angles.max() <= 15
