"""Regression on numbers made up from the seed (`data.kind = "regression"`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml import rng
from hpcml.data.core import Data
from hpcml.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]


class Linear:
    """Samples (x, y) with y = W x + b + noise and standard normal x, noise and weights.

    Sample i is a function of (seed, i), so that any rank can make any sample.
    """

    def __init__(
        self, first: int, samples: int, in_features: int, out_features: int, noise: float, seed: int
    ) -> None:
        """The samples numbered first .. first + samples - 1 of the endless stream of `seed`."""
        self.first, self.samples, self.noise = first, samples, noise
        self.in_features, self.out_features = in_features, out_features
        self._key = rng.key(seed, "regression samples")
        self.weight = np.empty((out_features, in_features), np.float32)
        rng.normal(rng.key(seed, "regression weight"), 0, self.weight)
        self.bias = np.empty(out_features, np.float32)
        rng.normal(rng.key(seed, "regression bias"), 0, self.bias)

    def __len__(self) -> int:
        """Number of samples."""
        return self.samples

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """Return sample `index`: x (in_features,) and y (out_features,), float32."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        draws = np.empty(self.in_features + self.out_features, np.float32)
        rng.normal(self._key, (self.first + index) * draws.size, draws)
        x, noise = draws[: self.in_features], draws[self.in_features :]
        # sample by sample: a product over many rows may round otherwise than one over few
        return x, self.weight @ x + self.bias + np.float32(self.noise) * noise


def regression(
    seed: int,
    samples: int = 4096,
    in_features: int = 16,
    out_features: int = 1,
    noise: float = 0.1,
    val_fraction: float = 0.1,
) -> Data:
    """A linear function of random numbers, plus noise of the given standard deviation.

    Offers models `in_features` and `out_features`; the loss that suits is "mse", which cannot fall
    below noise squared on validation samples. Raises `UserError` for sizes below 1.
    """
    for name, size in (
        ("samples", samples), ("in_features", in_features), ("out_features", out_features),
    ):  # fmt: skip
        if size < 1:
            raise UserError(f"data.{name}={size} must be at least 1")
    if not noise >= 0:
        raise UserError(f"data.noise={noise} must be at least 0")
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} must be at least 0 and below 1")
    kept = int(samples * val_fraction)
    shape = (in_features, out_features, noise, seed)
    train = Linear(0, samples - kept, *shape)
    val = Linear(samples - kept, kept, *shape) if kept else None
    info = {"in_features": in_features, "out_features": out_features}
    return Data(train, val, info, "mse")
