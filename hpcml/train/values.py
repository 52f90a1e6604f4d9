"""Values of a configuration: from TOML and the command line into typed Python, and back."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hpcml.errors import UserError

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Path: "a path in quotes",
    dict: "a table {a = 1}",
}
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


class Text(str):
    """A value as it was typed on the command line: its type is that of the key it is for."""

    def parse(self) -> Any:
        """Return what TOML reads in the text, or, for bare words, the text itself."""
        try:
            table = tomllib.loads(f"x = {self}")
        except tomllib.TOMLDecodeError:
            return str(self)
        return table["x"] if set(table) == {"x"} else str(self)


class _Unfit(Exception):
    """The value is not of the type."""


def convert(name: str, value: Any, annotation: Any) -> Any:
    """Return the value of key `name` in the type of an annotation; an int may stand for a float.

    Anything fits an annotation that TOML has no type for. Raises `UserError` otherwise.
    """
    readings = [value.parse(), str(value)] if isinstance(value, Text) else [value]
    for reading in readings:  # run.dir=2026-11-21 is a date to TOML, but a name to us
        try:
            return _fit(reading, annotation)
        except _Unfit:
            continue
    raise UserError(f"{name}={show(readings[0])} must be {describe(annotation)}")


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fit(value, args[0])
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise _Unfit
        return value
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, args)
    if (origin or annotation) in _SEQUENCES:
        return _fit_sequence(value, origin or annotation, args)
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if annotation is Path and type(value) is str:
        return Path(value)
    plain = origin or annotation
    known = plain in _PLAIN or annotation in (None, type(None))
    if known and (type(value) is not plain or plain is float):
        raise _Unfit
    return value


def _fit_one_of(value: Any, annotations: tuple[Any, ...]) -> Any:
    for annotation in sorted(annotations, key=lambda a: a is not type(value)):  # int before float
        try:
            return _fit(value, annotation)
        except _Unfit:
            continue
    raise _Unfit


def _fit_sequence(value: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        raise _Unfit
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _Unfit
        return tuple(_fit(item, arg) for item, arg in zip(value, args, strict=True))
    items = [_fit(item, args[0] if args else Any) for item in value]
    return tuple(items) if origin is tuple else items


def describe(annotation: Any) -> str:
    """Return what a value of a type looks like, for messages and help."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(show(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if (origin or annotation) in _SEQUENCES:
        if origin is tuple and args and args[-1] is not Ellipsis:
            return f"a list of {len(args)}: [{', '.join(describe(arg) for arg in args)}]"
        return f"a list of {describe(args[0])}" if args else "a list"
    return _PLAIN.get(origin or annotation, "a value")


def show(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, Text):
        value = value.parse()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {show(v)}" for k, v in value.items()) + "}"
    return str(value)


def writable(value: Any) -> bool:
    """Whether TOML can hold a value."""
    if isinstance(value, list | tuple):
        return all(writable(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and writable(v) for k, v in value.items())
    return isinstance(value, bool | int | str | Path) or (
        isinstance(value, float) and math.isfinite(value)
    )


def write(tables: dict[str, dict[str, Any]]) -> str:
    """Return tables of values as a TOML document."""
    blocks = []
    for name, table in tables.items():
        lines = [f"{_key(key)} = {show(value)}" for key, value in table.items()]
        blocks.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(blocks)


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean ...?" for a misspelt word, or the known ones if none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1, 0.7)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known: {', '.join(known)}" if known else "it takes none"


def guess(default: Any) -> Any:
    """Return the type of a parameter that has a default and no annotation."""
    if type(default) in (int, float):
        return int | float
    return type(default) if type(default) in (bool, str) else inspect.Parameter.empty


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else show(name)
