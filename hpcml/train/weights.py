"""Parameters on disk and their fingerprint, one parameter at a time.

The file is safetensors: the length of a header (8 bytes, little-endian), the header in JSON, and
the values one after the other. A model's parameters may be spread over ranks, so what is written
comes from `Step.gathered`, as pairs (name, values) that are gathered as they are asked for; what is
read becomes a rule of first values, from which each rank takes the slices that it owns.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hpcml.errors import UserError
from hpcml.nn import Module

Values = np.ndarray[Any, Any]
Entries = Iterable[tuple[str, Values]]
"""Name and values of each parameter of a model, a shared one once, in the order of definition."""

_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8),
             "BOOL": np.dtype(np.bool_)}  # fmt: skip
"""What buffers may have beside."""


def save(
    model: Module, entries: Entries, path: Path, buffers: Mapping[str, Values] | None = None
) -> str:
    """Write the entries of a model as safetensors, and return their fingerprint.

    Its buffers come after them, as they are; the fingerprint is of parameters alone. Their values
    are float64 in the file where the parameter is, and float32 otherwise. The file appears when it
    is complete. Raises UserError where it cannot be written, having gone through all entries: other
    ranks gather them together with this one.
    """
    temporary = path.with_suffix(".tmp")
    remaining, digest, failure = iter(entries), hashlib.sha256(), None
    try:
        with temporary.open("wb") as file:
            _write_header(model, file, buffers or {})
            for name, parameter in model.named_parameters():
                given, array = next(remaining)
                assert (name, parameter.whole_shape) == (given, array.shape)
                stored = _bytes(array)
                file.write(stored)
                digest.update(stored)
                del array, stored  # before the next one is gathered
            for array in (buffers or {}).values():
                file.write(np.ascontiguousarray(array).tobytes())
        temporary.replace(path)
    except OSError as error:
        failure = error
    for _ in remaining:
        pass
    if failure:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f'"{path}" cannot be written ({failure}): make room there, or set another run.dir'
        )
    return digest.hexdigest()


def fingerprint(entries: Entries) -> str:
    """SHA-256 over the values of the entries, as `save` writes them."""
    digest = hashlib.sha256()
    for _, array in entries:
        digest.update(_bytes(array))
        del array  # before the next one is gathered
    return digest.hexdigest()


@dataclass(frozen=True)
class Stored:
    """First values that lie in a file: `values`, flat, are a view of the mapped file."""

    values: Values

    def __call__(self, out: Values, key: int, start: int) -> None:
        """Fill the flat array `out`, of any floating-point type."""
        out[...] = self.values[start : start + out.size]


def load(model: Module, path: str | Path, key: str = "model.init_from") -> None:
    """Let the parameters begin with the values in a safetensors file, which are read when needed.

    Buffers get theirs at once. The file may hold floating-point values of any type. A shared
    parameter may be in it under any of its names. `key` is named in errors. Raises UserError, which
    tells all that does not fit.
    """
    try:
        stored, file = _open(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f'{key}="{path}" cannot be read ({error}): name a safetensors file'
        ) from None
    named = list(model.named_parameters(remove_duplicate=False))
    found = {id(parameter): name for name, parameter in named if name in stored}
    problems = [
        problem
        for name, parameter in named if name in stored
        for problem in _problems(name, stored[name], parameter.shape, _TYPES)
    ]  # fmt: skip
    problems += [f"{name} is missing" for name, parameter in named if id(parameter) not in found]
    buffers = dict(model.named_buffers())
    for name, buffer in buffers.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        else:
            problems += _problems(name, stored[name], buffer.shape, _TYPES | _INTEGERS)
    own = {name for name, _ in named} | set(buffers)
    problems += [f"{name} is unexpected" for name in stored if name not in own]
    if problems:
        raise UserError(
            f'{key}="{path}": state does not fit {type(model).__name__}: {"; ".join(problems)}'
        )
    for parameter in model.parameters():
        place = stored[found[id(parameter)]]
        values = np.frombuffer(file, _TYPES[place.dtype], math.prod(place.shape), place.offset)
        parameter.init = Stored(values)
        parameter.forget()
    for name, buffer in buffers.items():
        place, kinds = stored[name], _TYPES | _INTEGERS
        values = np.frombuffer(file, kinds[place.dtype], math.prod(place.shape), place.offset)
        buffer.data[...] = values.reshape(place.shape)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file: its type as safetensors calls it, shape, first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def _open(path: str | Path) -> tuple[dict[str, _Place], mmap.mmap]:
    """Map a file and return where its tensors lie. Raises OSError, and ValueError for its form."""
    from safetensors import SafetensorError, safe_open

    with Path(path).open("rb") as file:  # safetensors calls any failure "no such file"
        try:
            with safe_open(path, "numpy"):  # checks that the whole header makes sense
                pass
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack_from("<Q", mapped)
    header = json.loads(mapped[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: _Place(of["dtype"], tuple(of["shape"]), 8 + length + of["data_offsets"][0])
        for name, of in header.items()
    }, mapped


def _problems(
    name: str, place: _Place, shape: tuple[int, ...], types: Mapping[str, np.dtype[Any]]
) -> Iterator[str]:
    if place.shape != shape:
        yield f"{name} has shape {place.shape}, not {shape}"
    if place.dtype not in types:
        yield f"{name} has type {place.dtype}, not one of {', '.join(types)}"


def _write_header(model: Module, file: BinaryIO, buffers: Mapping[str, Values]) -> None:
    """The names, types, shapes and places of the values that follow, in the same order."""
    header: dict[str, Mapping[str, Any]] = {}
    end = 0
    parameters = [(name, _stored(p.dtype), p.whole_shape) for name, p in model.named_parameters()]
    others = [(name, array.dtype, array.shape) for name, array in buffers.items()]
    for name, dtype, shape in parameters + others:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = next(code for code, known in (_TYPES | _INTEGERS).items() if known == dtype)
        header[name] = {
            "dtype": code, "shape": shape, "data_offsets": (start, end)
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the values on disk, and of their fingerprint."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _bytes(array: Values) -> memoryview:
    """The values as they are stored: in logical C order, 16-bit types widened."""
    return np.ascontiguousarray(array, _stored(array.dtype)).reshape(-1).view(np.uint8).data
