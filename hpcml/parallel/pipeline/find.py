"""Schedules by name, from a file, or from a function of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path

from hpcml.errors import UserError
from hpcml.parallel.pipeline.actions import Schedule
from hpcml.parallel.pipeline.schedules import SCHEDULES
from hpcml.parallel.pipeline.text import parse

RANKS, MICROBATCHES = 4, 8
"""Sizes of a schedule for which nothing says otherwise."""

_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def find(
    source: str,
    ranks: int | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    **options: int | None,
) -> Schedule:
    """The schedule that `source` stands for.

    source: a name of `SCHEDULES`, a file in the format of `hpcml.parallel.pipeline.text`, or
    `package.module:function` of a function that is called with ranks, microbatches and chunks and
    returns a Schedule or its text. The current folder can be imported from.
    options: what the named schedule takes beyond sizes. Those that are None are not given.

    Raises UserError for what cannot be found, read or called, and for a table of other sizes. The
    table itself is for `check` to judge.
    """
    asked = {"chunks": chunks, **options}
    given = {name: value for name, value in asked.items() if value is not None}
    sizes = (
        RANKS if ranks is None else ranks,
        MICROBATCHES if microbatches is None else microbatches,
    )
    if source in SCHEDULES:
        return _built_in(source, *sizes, given)
    if Path(source).exists():
        found = _read(source)
    elif _FUNCTION.fullmatch(source):
        given.setdefault("chunks", 1)
        found = _call(source, *sizes, given.pop("chunks"))
        ranks, microbatches = sizes
    else:
        near = get_close_matches(source, SCHEDULES, 1)
        known = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SCHEDULES)}"
        raise UserError(
            f'schedule "{source}" is unknown, and no file: {known} (or package.module:function)'
        )
    if given:
        raise UserError(f'{", ".join(given)} with schedule "{source}": its table is all it takes')
    for name, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value is not None and getattr(found, name) != value:
            raise UserError(
                f'{name}={value} with schedule "{source}", a table for {getattr(found, name)}: '
                "use as many, or another table"
            )
    return found


def _built_in(name: str, ranks: int, microbatches: int, given: dict[str, int]) -> Schedule:
    function = SCHEDULES[name]
    takes = inspect.signature(function).parameters
    if given.get("chunks") == 1 and "chunks" not in takes:
        del given["chunks"]  # what it has
    for option, value in given.items():
        if option not in takes:
            able = [n for n, f in SCHEDULES.items() if option in inspect.signature(f).parameters]
            raise UserError(f"{option}={value} with schedule={name}: only {' '.join(able)} uses it")
    return function(ranks, microbatches, **given)


def _read(path: str) -> Schedule:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'schedule "{path}" cannot be read: {error}') from None
    return parse(text, path)


def _call(source: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Import and call a function of the user's; what goes wrong there is told in one line."""
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        made = function(ranks, microbatches, chunks)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f'schedule "{source}" ({ranks} ranks, {microbatches} microbatches, {chunks} chunks) '
            f"failed: {type(error).__name__}: {' '.join(str(error).split())} "
            f"({os.path.basename(frame.filename)}, line {frame.lineno})"
        ) from error
    if isinstance(made, str):
        return parse(made, source)
    if isinstance(made, Schedule):
        return made
    raise UserError(
        f'schedule "{source}" returned a {type(made).__name__}: return a Schedule or its text'
    )
