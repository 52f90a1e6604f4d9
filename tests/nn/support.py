"""A small model, of our layers or of PyTorch's."""

from __future__ import annotations

from typing import Any


def network(library: Any) -> Any:
    return library.Sequential(
        library.Embedding(7, 4),
        library.ModuleList([library.Linear(4, 4), library.LayerNorm(4)]),
        library.Sequential(library.Linear(4, 2), library.GELU()),
    )
