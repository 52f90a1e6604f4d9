"""Images that cannot be used: one line that names the file and says what to do."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.data.batches import Batch
from hpcml.data.images import images
from hpcml.errors import UserError
from tests.data.pictures import bytes_of, idx, write_mnist, write_pair

LABELS = np.arange(7) % 2


def refused(*parts: str, **keys: Any) -> None:
    """`images` raises one line that has all parts."""
    with pytest.raises(UserError) as caught:
        images(0, **{"val_fraction": 0.0} | keys)
    said = caught.value.report()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in said, said


def cut_file(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def npy(shape: str) -> bytes:
    """The begin of an .npy file whose header has this shape, and a few values."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + b"values"


def npz(images: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr("images.npy", images)
    return made.getvalue()


def with_flag(archive: bytes) -> bytes:
    """An archive that says of its first member that it is encrypted."""
    place = archive.index(b"PK\x01\x02") + 8
    return archive[:place] + b"\x01" + archive[place + 1 :]


CORRUPT: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "idx, cut off": ("a", lambda: idx(bytes_of()[:, 0])[:-1], "make 226 bytes, but it has 225"),
    "idx, too long": ("a", lambda: idx(bytes_of()[:, 0]) + b"x", "but it has 227"),
    "idx, header cut off": ("a", lambda: idx(bytes_of()[:, 0])[:9], "ends after 9 bytes"),
    "neither": ("a", lambda: b"\x89PNG and more", "89 50 4e 47"),
    "empty": ("a", lambda: b"", "neither .npy, .npz nor idx"),
    "gzip, cut off": ("a.gz", lambda: gzip.compress(idx(bytes_of()[:, 0]))[:-9], "no good file"),
    "gzip, garbled": ("a.gz", lambda: b"\x1f\x8b\x08\0" + b"\xff" * 40, "no good file"),
    "npy, cut off": ("a.npy", lambda: b"\x93NUMPY\x01\0v\0{'descr'", "no good file"),
    "npy, no end of its header": ("a.npy", lambda: npy("(7, "), "no good file"),
    "npy, beyond all memory": ("a.npy", lambda: npy(f"(7, {10**22}, 2)"), "no good file"),
    "npz, no zip": ("a.npz", lambda: b"PK\x03\x04 no more", "no good file"),
    "npz, no end of a header": ("a.npz", lambda: npz(npy("(7, ")), "no good file"),
    "npz, beyond all memory": ("a.npz", lambda: npz(npy(f"(7, {10**13}, 2)"), 8), "no good file"),
    "npz, encrypted": ("a.npz", lambda: with_flag(npz(npy("(7, 2, 2)"))), "is encrypted"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_files(tmp_path: Path, kind: str) -> None:
    name, content, said = CORRUPT[kind]
    path = tmp_path / name
    path.write_bytes(content())
    np.save(tmp_path / "labels.npy", LABELS)
    labels = "" if name.endswith("npz") else str(tmp_path / "labels.npy")
    refused(str(path), said, path=str(path), labels=labels)


def test_npy_that_ends_early(tmp_path: Path) -> None:
    path = write_pair(tmp_path, bytes_of(), LABELS)
    cut_file(path, path.stat().st_size - 5)
    refused(str(path), "no good file", path=str(path))


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=np.array([{}, {}], object), labels=np.arange(2))
    refused(str(path), "objects", path=str(path))


def test_labels_that_do_not_match(tmp_path: Path) -> None:
    for labels, said in (
        (LABELS[:6], 'has 7 images, but "'),
        (np.array(1), "no list of labels"),
        (LABELS.astype(float), "they must be integers"),
        (np.zeros((7, 6, 5), int), "for each image (7,) or for each pixel (7, 5, 6)"),
        (LABELS - 1, 'label -1 in "'),
    ):
        path = write_pair(tmp_path, bytes_of(), labels)
        refused("labels.npy", said, path=str(path))
    path = write_pair(tmp_path, bytes_of(), LABELS + 4)
    refused('label 5 in "', "labels.npy", "data.num_classes=3", path=str(path), num_classes=3)


def test_a_label_of_a_pixel_that_is_no_class(tmp_path: Path) -> None:
    """Masks are not read before they are needed."""
    given = bytes_of()
    path = write_pair(tmp_path, given, given[:, 0])
    train = images(0, str(path), num_classes=3, val_fraction=0).train
    with pytest.raises(UserError, match=r'label \d+ in ".*labels.npy": labels must be 0 to 2'):
        Batch(train, np.arange(7), 0)[:]


def test_labels_that_are_missing(tmp_path: Path) -> None:
    path = write_pair(tmp_path, bytes_of(), LABELS)
    (tmp_path / "labels.npy").unlink()
    refused("images.npy", '"labels.npy"', "set data.labels", path=str(path))
    np.savez(tmp_path / "data.npz", images=bytes_of(), targets=LABELS)
    refused("data.npz", "images, targets", 'no array "labels"', path=str(tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("NCWH", None),
        ("NHW", "have shape (7, 2, 5, 6), which is not"),
        ("NCHH", "name each dimension once"),
        ("CHW", "name each dimension once"),
        ("NCXY", "name each dimension once"),
    ],
)
def test_axes(tmp_path: Path, axes: str, said: str | None) -> None:
    path = write_pair(tmp_path, bytes_of(), LABELS)
    if said is None:
        assert images(0, str(path), axes=axes, val_fraction=0).info["size"] == (6, 5)
    else:
        refused("images.npy", f'data.axes="{axes}"', said, path=str(path), axes=axes)


def test_pictures(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    refused("has no folders", path=str(tmp_path))
    for name in "ab":
        (tmp_path / name).mkdir()
        pillow.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / name / "0.png")
    bad = tmp_path / "b" / "1.png"
    pillow.fromarray(np.zeros((4, 5), np.uint8)).save(bad)
    refused(f'"{bad}" has 5 x 4 pixels', '0.png" 6 x 4: make all', path=str(tmp_path))
    pillow.fromarray(np.zeros((4, 6), np.uint16)).save(bad)
    refused(f'"{bad}" has pixels of type I;16', path=str(tmp_path))
    bad.write_bytes(b"no picture")
    refused(f'"{bad}" cannot be decoded', "replace or remove", path=str(tmp_path))
    pillow.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)).save(bad)
    whole = bad.read_bytes()
    head = b"IHDR" + struct.pack(">II", 30000, 30000) + whole[24:29]
    bad.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])
    refused(f'"{bad}" cannot be decoded', "900000000 pixels", path=str(tmp_path))
    bad.write_bytes(whole)
    cut_file(bad, 50)  # the header is all right
    train = images(0, str(tmp_path), val_fraction=0, mean=(0.0,), std=(1.0,)).train
    with pytest.raises(UserError, match=r"1.png\" cannot be decoded"):
        Batch(train, np.arange(len(train)), 0)[:]
    bad.unlink()
    bad.symlink_to(tmp_path / "none.png")
    refused(f'"{bad}" is no file', "mend or remove", path=str(tmp_path))
    bad.unlink()
    (tmp_path / "b" / "0.png").unlink()
    refused('b" has no .png', "remove it", path=str(tmp_path))


def test_what_cannot_be(tmp_path: Path) -> None:
    path = str(write_pair(tmp_path, bytes_of(), LABELS))
    refused("does not exist", "digits, photographs", path=str(tmp_path / "none"))
    refused("val_fraction=0.1 of 7 images is none", path=path, val_fraction=0.1)
    refused("val_fraction=1.5", path=path, val_fraction=1.5)
    refused("data.shift=5 moves images of [5, 6] pixels", path=path, shift=5)
    refused("data.mean=[1, 2, 3]", "2 channels", path=path, mean=(1, 2, 3))
    refused("data.std=[0.0] must be above 0", path=path, std=(0.0,))
    write_mnist(tmp_path)
    write_mnist(tmp_path, zipped=False)
    refused("t10k-images-idx3-ubyte, t10k-images-idx3-ubyte.gz: name one", path=str(tmp_path))


@pytest.mark.parametrize(("module", "path"), [("sklearn", "digits"), ("PIL", "")])
def test_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"not looked at")
    refused("not installed: install hpcml[images]", path=path or str(tmp_path))


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    """They would make all weights NaN, and the loss say so where nobody looks for the cause."""
    array = np.random.default_rng(0).normal(size=(7, 1, 4, 6)).astype(np.float32)
    array[5, 0, 3, 4] = np.inf
    path = str(write_pair(tmp_path, array, LABELS))
    line = f'image 5 (from 0) of "{path}" has a pixel that is inf: mend the image'
    refused(line, path=path)
    data = images(0, path, val_fraction=0.0, mean=(0.0,), std=(1.0,), shift=1).train
    bad, part = np.array([5]), (slice(0, 4), slice(0, 3))
    with pytest.raises(UserError, match="image 5"):
        data.fetch_part(bad, bad)
    with pytest.raises(UserError, match="image 5"):
        data[5]
    assert np.isfinite(data[4][0]).all()
    assert np.isfinite(data.fetch_part(bad, bad, part)[0]).all(), "of another part of the image"
