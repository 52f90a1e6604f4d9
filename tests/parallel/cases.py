"""Models, batches and runs that the tests of `parallelize` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm.alone import Alone
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.optim import SGD, AdamW
from hpcml.parallel import Step

Fields = tuple[np.ndarray, ...]


class Own(nn.Module):
    """With a layer used twice, a frozen one, one never used, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.shared = nn.Linear(5, 5)
        self.again = self.shared
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.frozen(self.first(x)).tanh())
        return self.head(self.again(self.shared(x).tanh()))


def _numbers(size: int, step: int) -> Fields:
    random = np.random.default_rng([size, step])
    return random.normal(size=(size, 6)), random.normal(size=(size, 1))


def _classes(size: int, step: int) -> Fields:
    random = np.random.default_rng([size, step])
    return random.normal(size=(size, 2, 3)), random.integers(0, 4, size)


def _tokens(size: int, step: int) -> Fields:
    made = np.random.default_rng([size, step]).integers(0, 11, (2, size, 5))
    return made[0], made[1]


VOCAB, LENGTH = 13, 7
"""Of the batches that follow; no number of ranks divides them."""


def tokens(step: int, size: int = 5) -> Fields:
    """Tokens (size, LENGTH), and those that follow."""
    made = np.random.default_rng([1, step]).integers(0, VOCAB, (2, size, LENGTH))
    return made[0], made[1]


def targets(step: int, size: int = 5) -> Fields:
    """Tokens, and five numbers for each."""
    return tokens(step, size)[0], np.random.default_rng([2, step]).normal(size=(size, LENGTH, 5))


def classes(step: int, size: int = 5) -> Fields:
    """Six numbers a sample, as (2, 3), and one of four classes."""
    random = np.random.default_rng([3, step])
    return random.normal(size=(size, 2, 3)), random.integers(0, 4, size)


def squares(outputs: Tensor, target: Tensor) -> Tensor:
    """A loss that knows nothing of ranks."""
    return ((outputs - target) ** 2).mean()


def name_of(value: Any) -> str:
    """Of a parameter of a test: the items of a mapping."""
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def ranks_of(layout: dict[str, int]) -> int:
    """How many ranks axes of these sizes have."""
    return int(np.prod(list(layout.values())))


def in_turn(
    ways: list[tuple[dict[str, int], dict[str, Any]]],
    fits: Callable[[str, dict[str, int], dict[str, Any]], bool],
    kinds: Iterable[str],
) -> list[tuple[str, dict[str, int], dict[str, Any]]]:
    """Every way with one of the kinds that fit it: that which has had the fewest so far."""
    had = dict.fromkeys(kinds, 0)
    chosen = []
    for way in ways:
        kind = min((kind for kind in had if fits(kind, *way)), key=had.__getitem__)
        had[kind] += 1
        chosen.append((kind, *way))
    return chosen


class Kind(NamedTuple):
    """A model, its loss, and its batches as a function of (size, step)."""

    model: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[int, int], Fields]


KINDS = {
    "own": Kind(Own, nn.MSELoss(), _numbers),
    "mlp": Kind(lambda: MLP(6, 4, (7, 5), "gelu"), nn.CrossEntropyLoss(), _classes),
    "gpt": Kind(
        lambda: GPT(11, 5, layers=2, heads=2, width=8, dropout=0.2), NextTokenLoss(), _tokens
    ),
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 2e-3, "weight_decay": 0.1}),
}
CLIP = 0.3
WAYS: dict[str, dict[str, Any]] = {
    "1": {"zero": 1},
    "2": {"zero": 2},
    "3": {"zero": 3},
    "1 small buckets": {"zero": 1, "bucket_mb": 1e-4},
    "2 small buckets": {"zero": 2, "bucket_mb": 1e-4},
    "3 small buckets": {"zero": 3, "bucket_mb": 1e-4},
    "0 overlap": {"zero": 0, "overlap": True},
    "1 overlap": {"zero": 1, "overlap": True},
    "2 overlap": {"zero": 2, "overlap": True},
    "3 overlap": {"zero": 3, "overlap": True},
    "0 layers overlap": {"zero": 0, "zero_split": "layers", "overlap": True},
    "1 layers": {"zero": 1, "zero_split": "layers"},
    "2 layers": {"zero": 2, "zero_split": "layers"},
    "3 layers": {"zero": 3, "zero_split": "layers"},
    "3 layers overlap": {"zero": 3, "zero_split": "layers", "overlap": True},
    "3 overlap, small buckets": {"zero": 3, "overlap": True, "bucket_mb": 1e-4},
}
"""Stages and forms of ZeRO, as options of `parallelize`."""


def decay_matrices(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim >= 2]},
    ]


def serial_mesh() -> Mesh:
    """A mesh of this process alone, whatever job it belongs to."""
    return Mesh(Alone())


def make(
    kind: str,
    mesh: Mesh,
    dtype: str = "float64",
    optimizer: str = "sgd",
    model: nn.Module | None = None,
    **options: Any,
) -> Step:
    """`parallelize` of a kind, or of a given model of that kind; `options` are its own."""
    chosen, settings = OPTIMIZERS[optimizer]
    model = model or KINDS[kind].model().to(np.dtype(dtype))
    given = {"loss": KINDS[kind].loss, "seed": 3, **settings, **options}
    return hpcml.parallelize(model, optimizer=chosen, mesh=mesh, **given)


def values(step: Step) -> dict[str, np.ndarray]:
    """A copy of all parameters, brought together from where they lie."""
    return {name: array.copy() for name, array in step.gathered()}


class Trace(NamedTuple):
    """What came of a run: losses and norms by step, parameters after some steps."""

    losses: list[float]
    norms: list[float]
    parameters: dict[int, dict[str, np.ndarray]]


def run(
    kind: str,
    mesh: Mesh,
    dtype: str,
    optimizer: str,
    size: int,
    microbatch: int,
    steps: int,
    **options: Any,
) -> Trace:
    """Train with clipping, groups and dropout; keep parameters after steps 1 and 5."""
    step = make(
        kind, mesh, dtype, optimizer, microbatch=microbatch, grad_clip=CLIP, groups=decay_matrices,
        **options,
    )  # fmt: skip
    trace = Trace([], [], {})
    for number in range(steps):
        trace.losses.append(step(KINDS[kind].batch(size, number)))
        trace.norms.append(step.grad_norm)
        if number + 1 in (1, 5):
            trace.parameters[number + 1] = values(step)
    return trace


@cache
def reference(kind: str, dtype: str, optimizer: str, size: int, steps: int) -> Trace:
    """The same run by one process, each batch at once."""
    return run(kind, serial_mesh(), dtype, optimizer, size, 0, steps)


def compare(found: Trace, expected: Trace) -> None:
    """Float64 runs that must be alike, batch by batch and parameter by parameter."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-11)
    for after, parameters in expected.parameters.items():
        for name, array in parameters.items():
            np.testing.assert_allclose(
                found.parameters[after][name], array, rtol=0, atol=1e-12,
                err_msg=f"{name} after {after} steps",
            )  # fmt: skip


class Lazy:
    """A batch that notes which of its samples were asked for."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.asked: list[slice] = []

    def __len__(self) -> int:
        return len(self.fields[0])

    def __getitem__(self, part: slice) -> Fields:
        self.asked.append(part)
        return tuple(field[part] for field in self.fields)


def batches(kind: str, sizes: list[int]) -> Iterator[Fields]:
    """Batches of the given sizes."""
    return (KINDS[kind].batch(size, number) for number, size in enumerate(sizes))
