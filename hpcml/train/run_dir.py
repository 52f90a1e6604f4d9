"""The folder of a run: what lies in it, and the care not to lose what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcml.errors import UserError

FILES = ("config.toml", "env.json", "data.json", "metrics.jsonl", "summary.json",
         "model.safetensors")  # fmt: skip


class RunDir:
    """Names of the files of a run in folder `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def claim(self, overwrite: bool) -> None:
        """Make the folder ready for a new run.

        A folder with anything in it is refused; with `overwrite`, the files of an earlier run are
        deleted, and a folder that holds something else is still refused. Raises UserError.
        """
        name = f'run.dir="{self.path}"'
        try:
            there = sorted(os.listdir(self.path)) if self.path.is_dir() else []
            if there and not overwrite:
                raise UserError(
                    f"{name} holds {there[0]!r}: set run.overwrite=true to replace a run, or "
                    "another run.dir"
                )
            strange = [entry for entry in there if entry not in (*FILES, "ranks")]
            if strange:
                raise UserError(f"{name} holds {strange[0]!r}, no file of a run: set another run.dir")
            for entry in there:
                if entry != "ranks":
                    (self.path / entry).unlink()
            for file in (self.path / "ranks").glob("rank-*.jsonl"):
                file.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / "config.toml"
            probe.touch()
        except OSError as error:
            raise UserError(
                f"{name} cannot be written ({error.strerror}): set run.dir to a writable folder"
            ) from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file as a whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(self.path / name)


class JsonLines:
    """A file of JSON objects, a line each, readable at any time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w", buffering=1)  # a line reaches the file when it is complete

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
