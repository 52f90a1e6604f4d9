"""Text files: finding what `data.path` names, and reading it; each mistake has its clear line."""

from __future__ import annotations

import codecs
import glob
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from hpcml.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY_BYTES = 1 << 21
"""How much of the standard library's source the default text takes: a demo is to start quickly."""

CHECKED_BYTES = 1 << 24
"""How far into a mapped file binary content is looked for: a large file must start quickly."""


def find(path: str) -> list[Path]:
    """Return the files a path names, sorted: a file, a folder's (also below it), or a glob's.

    Hidden files and folders of a folder are left out. An empty path means Python's own library.
    Raises `UserError` if nothing is there.
    """
    if not path:
        return _library()
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            files = sorted(_visible(place))
            remedy = "put text files there or name another folder"
        elif place.exists():
            if not place.is_file():
                raise UserError(f'data.path="{path}" is no regular file: give a text file')
            return [place]
        elif glob.has_magic(path):
            files = sorted(Path(p) for p in glob.glob(str(place), recursive=True))
            files = [file for file in files if file.is_file()]
            remedy = "quote the pattern and check it with ls"
        else:
            raise UserError(
                f'data.path="{path}" does not exist: give a text file, a folder or a glob'
            )
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, UserError):
            raise
        raise unreadable(path, error) from None
    if not files:
        raise UserError(f'data.path="{path}" names no files: {remedy}')
    return files


def read(files: list[Path], path: str) -> list[tuple[Path, Array]]:
    """Return the files that are not empty with their bytes (uint8), memory-mapped.

    Raises `UserError` if one cannot be read, or if all are empty.
    """
    contents: list[tuple[Path, Array]] = []
    for file in files:
        try:
            if file.stat().st_size:
                contents.append((file, np.memmap(file, np.uint8, "r")))
        except OSError as error:
            raise unreadable(str(file), error) from None
    if not contents:
        what = "is empty" if len(files) == 1 else f"names {len(files)} files, all of them empty"
        raise UserError(f'data.path="{path or files[0].parent}" {what}: give a file with text')
    return contents


def check_head(file: Path, content: Array) -> None:
    """Refuse a file whose first bytes are not text; a large file is not read whole for that."""
    decode(file, content[:CHECKED_BYTES], whole=len(content) <= CHECKED_BYTES)


def decode(file: Path, content: Array, whole: bool = True) -> str:
    """Return the text of a file's bytes. `whole=False`: they may end within a character.

    Raises `UserError` that says where the bytes are not text (UTF-8 without zero bytes).
    """
    raw = content.tobytes()
    zero = raw.find(b"\0")
    if zero >= 0:
        raise UserError(
            f'data file "{file}" is binary (zero byte at offset {zero}): '
            "give text files, for example by a glob such as folder/*.txt"
        )
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except UnicodeDecodeError as error:
        raise UserError(
            f'data file "{file}" is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset '
            f"{error.start}): convert it to UTF-8, or leave it out of data.path"
        ) from None


def unreadable(path: str, error: Exception) -> UserError:
    """Return the error for a file or folder that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f'data.path: "{path}" cannot be read ({reason}): check it and its permissions')


def _visible(folder: Path) -> list[Path]:
    """Return the regular files of a folder and of those below it, without hidden ones."""
    files: list[Path] = []

    def refuse(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return [file for file in files if file.is_file()]


def _library() -> list[Path]:
    """Return the first source files of Python's own library, in alphabetical order."""
    files, total = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        total += file.stat().st_size
        if total > LIBRARY_BYTES:
            break
        files.append(file)
    if not files:
        raise UserError("Python's own library has no source files here: set data.path to a text")
    return files
