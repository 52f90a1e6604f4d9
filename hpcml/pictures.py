"""Matplotlib, which draws our pictures where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from hpcml.errors import UserError


def pyplot() -> Any:
    """Matplotlib's pyplot without a display; raises `UserError` where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise UserError("--plot needs matplotlib: install hpcml[plot]") from None


def check_picture(path: str) -> None:
    """Raise UserError for a file that could not be drawn to, before anything is measured."""
    known = pyplot().figure().canvas.get_supported_filetypes()
    kind = Path(path).suffix[1:] or "png"
    if kind not in known:
        raise UserError(f"--plot {path}: .{kind} is no picture: take one of {', '.join(known)}")
