"""What a data factory returns: data sets to train and validate, and what models ask of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hpcml.data.tokenizers import Tokenizer
from hpcml.errors import UserError


class Dataset(Protocol):
    """A map-style data set: `dataset[i]` is one sample, a tuple of arrays or numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Data:
    """The data of a run.

    `info` holds what a model may ask for by the name of a parameter (such as `vocab_size`), `loss`
    names the loss that suits the data, `tokenizer` turns text into samples and back. `metrics` are
    recorded beside the loss: see `hpcml.parallelize`.
    """

    train: Dataset
    val: Dataset | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    tokenizer: Tokenizer | None = None
    metrics: Mapping[str, Callable[[Any, Any], float]] = field(default_factory=dict)


def as_data(made: Any) -> Data:
    """Return what a data factory made as `Data`: it may be a data set, or a pair (train, val).

    Raises `UserError` for anything else, and for a training set without samples.
    """
    if isinstance(made, Data):
        data = made
    else:
        data = Data(*made) if isinstance(made, tuple) and len(made) == 2 else Data(made)
    parts = [("training", data.train)]
    if data.val is not None:
        parts.append(("validation", data.val))
    for part, dataset in parts:
        if not hasattr(type(dataset), "__len__") or not hasattr(type(dataset), "__getitem__"):
            raise UserError(
                f"data.kind made a {type(dataset).__name__} for {part}: it needs __len__ and "
                "__getitem__ (return a data set, a pair (train, val) or hpcml.data.Data)"
            )
        if len(dataset) < 1:
            raise UserError(f"data.kind made a {part} set of 0 samples: give it at least one")
    return data
