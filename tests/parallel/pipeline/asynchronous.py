"""Models for asynchronous pipelines, and one process that trains them, all versions in lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import hpcml
from hpcml import nn, rng
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.optim import SGD, AdamW
from hpcml.parallel import Step
from hpcml.parallel.pipeline.chain import links
from hpcml.parallel.pipeline.partition import stages
from tests.parallel.cases import (
    LENGTH,
    VOCAB,
    Fields,
    classes,
    decay_matrices,
    serial_mesh,
    tokens,
    values,
)

SEED = 5


class Turned(nn.Module):
    """Its backward keeps a view of its weight, not the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(shape=(6, 6), init=nn.parameter.Normal(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.transpose(1, 0)).tanh()


def _flat(step: int, size: int = 5) -> Fields:
    random = np.random.default_rng([4, step])
    return random.normal(size=(size, 6)), random.integers(0, 6, size)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Fields], str]] = {
    "gpt": (lambda: GPT(VOCAB, LENGTH, 3, 2, 8, 0.2, tie_embeddings=False), NextTokenLoss(), tokens,
            "float32"),
    "mlp": (lambda: MLP(6, 4, (11, 9, 7, 8)), nn.CrossEntropyLoss(), classes, "float64"),
    "turned": (lambda: nn.Sequential(*(Turned() for _ in range(4))), nn.CrossEntropyLoss(), _flat,
               "float64"),
}  # fmt: skip
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
}
RULES: dict[str, dict[str, Any]] = {
    "stashed": {"schedule": "pipedream"},
    "vertical": {"schedule": "pipedream", "vertical_sync": True},
    "double": {"schedule": "pipedream-2bw"},
}


def make(kind: str, mesh: Mesh, optimizer: str = "adamw", dtype: str = "", **options: Any) -> Step:
    model, loss, _, usual = MODELS[kind]
    chosen, settings = OPTIMIZERS[optimizer]
    given = {"seed": SEED, "microbatch": 1, "groups": decay_matrices, **settings, **options}
    made = model().to(hpcml.backend.dtype(dtype) if dtype else np.dtype(usual))
    return hpcml.parallelize(made, loss=loss, optimizer=chosen, mesh=mesh, **given)


class Feed(NamedTuple):
    """The samples of each call; None to settle before the next one."""

    sizes: Sequence[int | None] = (3, 3, 3, 3)
    microbatch: int = 1
    rates: Sequence[float] = ()
    """The learning rate of each call, where they differ."""


class Trace(NamedTuple):
    losses: list[float]
    parameters: dict[str, np.ndarray]
    squares: Sequence[Sequence[float]] = ()
    """Of the gradient of each update, by stage."""


def calls(kind: str, feed: Feed) -> Iterator[tuple[Any, float | None]]:
    """The batch and rate of each call, None for settling."""
    batch, rates = MODELS[kind][2], iter(feed.rates)
    for number, size in enumerate(feed.sizes):
        yield (None, None) if size is None else (batch(number, size), next(rates, None))


def trained(kind: str, mesh: Mesh, feed: Feed = Feed(), **options: Any) -> Trace:  # noqa: B008
    """What the package makes of it."""
    step = make(kind, mesh, microbatch=feed.microbatch, **options)
    losses = []
    for batch, rate in calls(kind, feed):
        if batch is None:
            step.settle()
            continue
        set_rate(step, rate)
        losses.append(step(batch))
    return Trace(losses, values(step))


def set_rate(step: Step, rate: float | None) -> None:
    for group in step.optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate


def version(rule: str, t: int, stage: int, n: int) -> int:
    """Of what weights the gradient is that makes w(t+1) of w(t): the papers' formulas.

    t: the microbatch, or the batch of 2BW. stage: from 1 to n.
    """
    return max(0, {"stashed": t - n + stage, "vertical": t - n + 1, "double": t - 1}[rule])


@cache
def simulated(
    kind: str, n: int, rule: str, feed: Feed = Feed(), optimizer: str = "adamw",  # noqa: B008
    ranks: int = 1, where: tuple[str, ...] = (), **options: Any,
) -> Trace:  # fmt: skip
    """A plain model in one process, with the weights of every version in a list.

    ranks: data-parallel ones, which compute as many microbatches for an update. where: cuts.
    """
    step = make(kind, serial_mesh(), optimizer, microbatch=feed.microbatch, **options)
    model, loss_of, trainer = step.model, MODELS[kind][1], step.optimizer
    stage_of = {id(p): s.index + 1 for s in stages(links(model), n, where) for p in s.parameters}
    every = list(model.parameters())
    history = [[p.data.copy() for p in every]]

    def install(versions: Sequence[int]) -> None:
        for number, (p, chosen) in enumerate(zip(every, versions, strict=True)):
            p.data[...] = history[chosen][number]

    def update() -> None:
        install([-1] * len(every))
        squares.append([0.0] * n)
        for p in every:
            squares[-1][stage_of[id(p)] - 1] += float((p.gradient**2).sum())
        trainer.step()
        trainer.zero_grad()
        history.append([p.data.copy() for p in every])

    losses, squares, sample = list[float](), list[list[float]](), 0
    for batch, rate in calls(kind, feed):
        if batch is None:  # a table begins anew
            del history[:-1]
            continue
        set_rate(step, rate)
        size, total = len(batch[0]), 0.0
        for start in range(0, size, feed.microbatch * ranks):
            t = len(history) - 1
            install([version(rule, t, stage_of[id(p)], n) for p in every])
            whole = size if rule == "double" else min(feed.microbatch * ranks, size - start)
            for first in range(start, min(start + feed.microbatch * ranks, size), feed.microbatch):
                x, y = (field[first : first + feed.microbatch] for field in batch)
                with rng.samples(SEED, sample + first):
                    loss = loss_of(model(_tensor(x, every[0])), Tensor(y))
                total += loss.item() * (len(x) / size)
                loss.backward(np.full(loss.shape, len(x) / whole, loss.dtype))
            if rule != "double":
                update()
        if rule == "double":
            update()
        losses.append(total)
        sample += size
    return Trace(losses, values(step), squares)


def _tensor(x: np.ndarray, like: Tensor) -> Tensor:
    return Tensor(x.astype(like.dtype) if x.dtype.kind == "f" else x)


def same(found: Trace, expected: Trace) -> None:
    """To the bit; of losses the sums may be rounded otherwise."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-14)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, array in expected.parameters.items():
        assert found.parameters[name].tobytes() == array.tobytes(), name
