"""The folder of a run: what lies in it, and the care not to lose what is there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from hpcml.errors import UserError

FILES = ("config.toml", "env.json", "data.json", "metrics.jsonl", "summary.json",
         "model.safetensors", "trace.json")  # fmt: skip


class RunDir:
    """Names of the files of a run in folder `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock: TextIO | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that holds something or cannot be written; changes nothing.

        With `overwrite` the files of an earlier run may be there, and nothing else.
        """
        name = f'run.dir="{self.path}"'
        there = self._entries()
        if there and not overwrite:
            raise UserError(
                f"{name} holds {there[0]!r}: set run.overwrite=true to replace a run, or another "
                "run.dir"
            )
        strange = [entry for entry in there if not _ours(entry)]
        if strange:
            raise UserError(f"{name} holds {strange[0]!r}, no file of a run: set another run.dir")
        place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise self._unwritable("is a file" if place.is_file() else "permission denied", place)

    def claim(self, overwrite: bool) -> None:
        """Make the folder, with `overwrite` empty of what an earlier run left. Raises UserError.

        Locks it until `release`: of two runs that start at once one is refused.
        """
        first = self.path / "config.toml"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = first.open("a" if overwrite else "x")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in self._entries():
                if entry not in ("ranks", first.name):
                    (self.path / entry).unlink()
            for pattern in ("rank-*.jsonl", "trace-*.json"):
                for file in (self.path / "ranks").glob(pattern):
                    file.unlink()
        except (FileExistsError, BlockingIOError):
            self.release()
            raise UserError(
                f'run.dir="{self.path}" was taken by another run just now: set another run.dir'
            ) from None
        except OSError as error:
            raise self._unwritable(error.strerror or str(error), self.path) from None

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _entries(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path)) if self.path.is_dir() else []
        except OSError as error:
            raise self._unwritable(error.strerror or str(error), self.path) from None

    def _unwritable(self, reason: str, place: Path) -> UserError:
        return UserError(
            f'run.dir="{self.path}" cannot be written ({place}: {reason}): set run.dir to a '
            "writable folder"
        )

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file as a whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(json.dumps(value, indent=1) + "\n")
            temporary.replace(self.path / name)
        except OSError as error:
            raise self._unwritable(error.strerror or str(error), temporary) from None


class JsonLines:
    """A file of JSON objects, a line each, readable at any time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)  # a line reaches the file when it is complete

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object. Raises UserError where the disk is full."""
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f'"{self._file.name}" cannot be written ({error.strerror}): make room there, or '
                "set another run.dir"
            ) from None

    def close(self) -> None:
        """Close the file; what could not be written was told before."""
        with suppress(OSError):
            self._file.close()


def _ours(entry: str) -> bool:
    """Whether a run leaves something of this name, finished or cut short."""
    return entry in (*FILES, "ranks") or entry.endswith(".tmp") or entry.startswith(".tmp")
