"""Images in files of arrays: MNIST's idx format, and NumPy's .npy and .npz.

What lies uncompressed in a file is memory-mapped: .npy, members of an .npz that were stored (as
`np.savez` does), and idx without gzip.
"""

from __future__ import annotations

import gzip
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.data.files import unreadable
from hpcml.data.images.source import InArray, Source
from hpcml.errors import UserError

_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""By the third byte of an idx file (LeCun, Cortes, Burges, "The MNIST database", on its page)."""
_DEFAULT_AXES = {3: "NHW", 4: "NCHW", 5: "NCDHW"}
_SPACES = ("W", "HW", "DHW")
_UNREADABLE = (OSError, ValueError, EOFError, OverflowError, MemoryError, RuntimeError,
               tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # fmt: skip
"""What is raised for content that is not right: a header with a bracket too few or sizes beyond all
memory, an archive that is encrypted or compressed in an unknown way, and what these names say."""


def load(path: Path, labels: str, axes: str) -> Source:
    """The images of a file, with the labels of another one (or of the same .npz).

    labels: their file; by default the name of the images' with "labels" in place of "images" (and
    idx1 of idx3). axes: what the dimensions of the images are. Raises UserError.
    """
    if path.suffix == ".npz" and not labels:
        members = _read_npz(path)
        for name in ("images", "labels"):
            if name not in members:
                raise UserError(
                    f'"{path}" has {", ".join(members) or "nothing"}, but no array "{name}": '
                    "write it by np.savez(file, images=..., labels=...), or set data.labels"
                )
        names = f"{path}:images", f"{path}:labels"
        return Source(in_order(names[0], members["images"], axes), members["labels"], names)
    other = Path(labels).expanduser() if labels else _labels_of(path)
    return Source(in_order(str(path), read(path), axes), read(other), (str(path), str(other)))


def in_order(name: str, array: Array, axes: str) -> InArray:
    """Images as (N, C, *S), a view; `axes` such as "NHWC" says what the dimensions are."""
    if array.dtype.kind not in "biuf":
        raise UserError(f'images "{name}" are {array.dtype}: give numbers')
    axes = axes or _DEFAULT_AXES.get(array.ndim, "")
    space = "".join(sorted(set(axes) - set("NC")))
    if len(set(axes)) != len(axes) or "N" not in axes or space not in _SPACES or space == "W":
        known = ", ".join(_DEFAULT_AXES.values())
        raise UserError(
            f'data.axes="{axes}" of images "{name}" with shape {array.shape}: name each dimension '
            f"once, N, C (if there is one) and HW or DHW, such as {known} or NHWC"
        )
    if len(axes) != array.ndim:
        raise UserError(
            f'images "{name}" have shape {array.shape}, which is not data.axes="{axes}": name '
            f"its {array.ndim} dimensions"
        )
    if "C" not in axes:
        array, axes = array[..., None], axes + "C"
    return InArray(array.transpose([axes.index(axis) for axis in "NC" + space]))


def read(path: Path) -> Array:
    """The array of a file: .npy, the only one of an .npz, or idx, also gzipped; or UserError."""
    try:
        if path.suffix == ".npz":
            members = _read_npz(path)
            if len(members) != 1:
                raise UserError(f'"{path}" has {len(members)} arrays: give a file of one')
            return next(iter(members.values()))
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return _read_idx(path)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise _bad(path, error) from None


def _bad(path: Path, error: Exception) -> UserError:
    """The error of a file that the system does not let read, or whose content is not right."""
    if isinstance(error, OSError) and error.errno:
        return unreadable(str(path), error)
    return _corrupt(path, error)


def _corrupt(path: Path, error: object) -> UserError:
    return UserError(f'"{path}" is no good file of its kind ({error}): get or write it again')


def _labels_of(path: Path) -> Path:
    """Where labels lie beside images."""
    before, found, after = path.name.rpartition("images")
    name = before + ("labels" if found else "") + after.replace("idx3", "idx1")
    stem = name.removesuffix(".gz")
    for other in (name, stem, f"{stem}.gz"):
        if other != path.name and path.with_name(other).is_file():
            return path.with_name(other)
    raise UserError(f'no labels of "{path}" (as "{name}") beside it: set data.labels to their file')


# --- idx ----------------------------------------------------------------------------------------


def _read_idx(path: Path) -> Array:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if not zipped:
        with path.open("rb") as file:
            shape, dtype, start = _idx_header(path, file.read(64), path.stat().st_size)
        return np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else np.empty(shape)
    with gzip.open(path) as unzipped:
        content = unzipped.read()
    shape, dtype, start = _idx_header(path, content, len(content))
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def _idx_header(path: Path, head: bytes, length: int) -> tuple[tuple[int, ...], Any, int]:
    """Shape, type and place of the values of an idx file whose content is so long."""
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not head[3]:
        raise UserError(
            f'"{path}" is neither .npy, .npz nor idx (its first bytes are {head[:4].hex(" ")}): '
            "give one of these, or a folder with a folder of pictures for each class"
        )
    dtype, start = np.dtype(_IDX_TYPES[head[2]]), 4 + 4 * head[3]
    if len(head) < start:
        raise _corrupt(path, f"it ends after {length} bytes")
    shape = struct.unpack_from(f">{head[3]}I", head, 4)
    expected = start + math.prod(shape) * dtype.itemsize
    if length != expected:
        raise _corrupt(path, f"{shape} values make {expected} bytes, but it has {length}")
    return shape, dtype, start


# --- npz ----------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by name, mapped where they are not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(path, archive, info)
                for info in archive.infolist()
            }
    except _UNREADABLE as error:
        raise _bad(path, error) from None


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"format {version} of {info.filename}")
        shape, fortran, dtype = read_header(member)
        within = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} has objects, not numbers")
    with path.open("rb") as file:  # the name and extra field of a member lie before its content
        file.seek(info.header_offset + 26)
        before = 30 + sum(struct.unpack("<HH", file.read(4)))
    start = info.header_offset + before + within
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
