"""Images of every kind of file, parts of them, and what batches of them hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.data import Batches
from hpcml.data.batches import Batch
from hpcml.data.images import Images, dataset, images
from hpcml.data.images.source import InArray
from tests.data.pictures import bytes_of, write_mnist, write_pair

PLAIN = {"mean": (0.0,), "std": (1.0,)}
LABELS = np.array([2, 0, 1, 1, 0, 2, 1])


def whole(dataset: Images) -> tuple[np.ndarray, np.ndarray]:
    """All samples, in order."""
    return next(iter(Batches(dataset, len(dataset), None)))[:]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool, named: bool) -> None:
    expected, labels = write_mnist(tmp_path, zipped=zipped)
    file = f"t10k-images-idx3-ubyte{'.gz' * zipped}" if named else ""
    data = images(0, str(tmp_path / file), val_fraction=0.2, **PLAIN)
    assert (len(data.train), len(data.val)) == (16, 4)  # the last part validates
    for part, place in ((data.train, slice(16)), (data.val, slice(16, 20))):
        found, targets = whole(part)
        np.testing.assert_array_equal(found, expected[place, None])
        np.testing.assert_array_equal(targets, labels[place])
    assert found.dtype == np.float32 and targets.dtype == np.int64
    if not zipped:
        assert isinstance(data.train.source.pictures.array.base, np.memmap)


@pytest.mark.parametrize("most", [1000, 200])
def test_no_image_is_looked_at_as_a_whole_to_normalise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """It may be one that no rank has room for: bands of it are, or some of them."""
    pixels = np.random.default_rng(0).normal(3, 2, (2, 3, 25, 6)).astype(np.float32)
    path = write_pair(tmp_path, pixels, LABELS[:2])
    monkeypatch.setattr(dataset, "PIECE", 80)  # 4 rows
    monkeypatch.setattr(dataset, "MEASURED", most)
    monkeypatch.setattr(InArray, "take", None)
    sizes: list[int] = []
    part = InArray.part

    def spied(self: InArray, *what: Any) -> np.ndarray:
        sizes.append((found := part(self, *what)).size)
        return found

    monkeypatch.setattr(InArray, "part", spied)
    data = images(0, str(path), axes="NCHW", val_fraction=0)
    assert max(sizes) <= 80 and sum(sizes) == (900 if most == 1000 else 144)
    seen = pixels if most == 1000 else pixels[:1, :, [*range(4), *range(21, 25)]]
    np.testing.assert_allclose(data.train.mean, seen.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.train.std, seen.std((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", ["pair.npy", "stored.npz", "packed.npz"])
def test_numpy_files(tmp_path: Path, name: str) -> None:
    expected = bytes_of()
    if name.endswith("npy"):
        path = write_pair(tmp_path, expected, LABELS)
    else:
        save = np.savez if name.startswith("stored") else np.savez_compressed
        path = tmp_path / name
        save(path, images=np.asfortranarray(expected), labels=LABELS)
    data = images(0, str(path), val_fraction=0, **PLAIN)
    found, targets = whole(data.train)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(targets, LABELS)
    mapped = isinstance(data.train.source.pictures.array.base, np.memmap)
    assert mapped == (name != "packed.npz")  # no more is read than is asked for
    assert data.info["size"] == (5, 6) and data.info["num_classes"] == 3
    assert data.val is None


@pytest.mark.parametrize("axes", ["NCHW", "NHWC", "HWNC", "NHW", "NDHW", "NDHWC"])
def test_order_of_dimensions(tmp_path: Path, axes: str) -> None:
    given = bytes_of(7, (3, 5, 6)[-sum(a in "DHW" for a in axes) :], 2 if "C" in axes else 1)
    names = [axis for axis in "NCDHW" if axis in axes or axis == "C"]
    stored = np.einsum(given, range(given.ndim), [names.index(axis) for axis in axes if axis != "C"]
                       + ([1] if "C" not in axes else [])) if "C" not in axes else given.transpose(
        [names.index(axis) for axis in axes])  # fmt: skip
    stored = stored[..., 0] if "C" not in axes else stored
    path = write_pair(tmp_path, stored, LABELS)
    found, _ = whole(images(0, str(path), axes=axes, val_fraction=0, **PLAIN).train)
    np.testing.assert_array_equal(found, given)


def test_folders_of_pictures(tmp_path: Path) -> None:
    """Folders are classes; every part of the samples has its share of each."""
    pillow = pytest.importorskip("PIL.Image")
    counts = {"cat": 4, "dog": 2}
    made = {}
    for name, count in counts.items():
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(bytes_of(count, (5, 6), 3)):
            made[name, i] = pixels
            suffix = "png" if i else "PNG"
            pillow.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / name / f"{i}.{suffix}")
    data = images(0, str(tmp_path), val_fraction=0.5, **PLAIN)
    assert data.info["classes"] == ("cat", "dog")
    for part, order in (
        (data.train, [("cat", 0), ("dog", 0), ("cat", 1)]),
        (data.val, [("cat", 2), ("dog", 1), ("cat", 3)]),
    ):
        found, targets = whole(part)
        np.testing.assert_array_equal(found, [made[key] for key in order])
        assert targets.tolist() == [list(counts).index(name) for name, _ in order]
        cut, _ = Batch(part, np.arange(3), 0).part(slice(1, 3), (slice(2, 4), slice(1, 6)))
        np.testing.assert_array_equal(cut, found[1:3, :, 2:4, 1:6])


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        pillow.fromarray(np.full((4, 3), 100, np.uint8)).save(tmp_path / str(number) / "a.jpeg")
    data = images(0, str(tmp_path), val_fraction=0)
    assert (data.info["in_channels"], data.info["size"]) == (1, (4, 3))
    assert not whole(data.train)[0].any()  # the mean is subtracted, a deviation of 0 left out


def test_bundled_images() -> None:
    pytest.importorskip("sklearn")
    data = images(0)
    assert (len(data.train) + len(data.val), data.info["num_classes"]) == (1797, 10)
    found, _ = whole(data.train)
    assert found.shape[1:] == (1, 8, 8)
    assert abs(found.mean()) < 1e-5 and abs(found.std() - 1) < 1e-5
    pytest.importorskip("PIL")
    photos = images(0, "photographs", val_fraction=0.1)
    assert (len(photos.train), len(photos.val)) == (126, 14)
    found, targets = whole(photos.val)
    assert found.shape == (14, 3, 61, 64) and targets.sum() == 7


def test_normal_by_channel(tmp_path: Path) -> None:
    given = bytes_of(40).astype(np.float32)
    given[:, 1] = 3 * given[:, 1] - 100
    path = write_pair(tmp_path, given, np.arange(40) % 3)
    data = images(0, str(path), val_fraction=0.25)
    found, _ = whole(data.train)
    np.testing.assert_allclose(found.mean((0, 2, 3)), 0, atol=1e-5)  # of the training part alone
    np.testing.assert_allclose(found.std((0, 2, 3)), 1, atol=1e-5)
    chosen = images(0, str(path), mean=(1.0, 2.0), std=(4.0,))
    np.testing.assert_allclose(chosen.train[0][0][1], (given[0, 1] - 2) / 4, rtol=1e-6)


@pytest.mark.parametrize("size", [(5, 6), (3, 5, 6)], ids=str)
def test_labels_of_pixels_are_cut_with_the_image(tmp_path: Path, size: tuple[int, ...]) -> None:
    given = bytes_of(7, size)
    path = write_pair(tmp_path, given, given[:, 0] % 5)
    data = images(0, str(path), val_fraction=0, **PLAIN)
    assert data.info["num_classes"] == 5
    batch = Batch(data.train, np.array([4, 0, 6]), 0)
    space = (slice(1, 2), slice(2, 5), slice(0, 4))[-len(size) :]
    found, targets = batch.part(slice(1, 3), space)
    rows, every = (slice(1, 3),), (slice(None),)
    x, y = batch[:]
    np.testing.assert_array_equal(found, x[rows + every + space])
    np.testing.assert_array_equal(targets, y[rows + space])


def test_parts_of_a_data_set_that_knows_of_none() -> None:
    x, y = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5), np.arange(2 * 4 * 5).reshape(2, 4, 5)
    batch = Batch([(x[0], y[0], 7), (x[1], y[1], 8)], np.array([1, 0]), 0)
    found = batch.part(slice(0, 2), (slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(found[0], x[::-1, :, 1:3, :2])
    np.testing.assert_array_equal(found[1], y[::-1, 1:3, :2])
    assert found[2].tolist() == [8, 7]


def test_no_more_is_read_than_asked_for() -> None:
    """A mapped file is not touched beyond the part."""
    asked = []

    class Spy(np.ndarray):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            asked.append(index)
            return super().__getitem__(index)

    pictures = InArray(bytes_of().view(Spy))
    pictures.part(3, (slice(1, 2), slice(2, 5)))
    assert asked == [(3, slice(None), slice(1, 2), slice(2, 5))]
