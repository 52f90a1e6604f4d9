"""Whole models, divided as they declare, beside the same model of one rank, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.nn import functional as F
from hpcml.parallel import Step
from tests.parallel.cases import (
    CLIP,
    LENGTH,
    VOCAB,
    Fields,
    classes,
    decay_matrices,
    in_turn,
    name_of,
    ranks_of,
    serial_mesh,
    squares,
    targets,
    tokens,
    values,
)

cases = pytest.mark.parametrize
STEPS = 3


class Attention(nn.Module):
    """Written by hand, as users do: projections of their own, a norm of each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(self.size)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]  # not the length: of x a rank may have some positions only
        q, k, v = (
            layer(x).reshape(b, -1, self.heads, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, -1, self.heads * self.size))


class Scale(nn.Module):
    """A factor for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(shape=(width,), init=nn.Uniform(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Own(nn.Module):
    """A user's own model: own attention, an odd width inside, a frozen layer, dropout within."""

    splits: ClassVar = {
        "embed": "vocab",
        "attention": "heads",
        "attention.[qkv]": "column",
        "attention.norm": "replicated",
        "attention.out": "row",
        "up": "column",
        "scale": "divided",
        "inner": "divided",
        "down": "row",
        "head": "output",
    }

    def __init__(self) -> None:
        super().__init__()
        width = 24
        self.embed = nn.Embedding(VOCAB, width)
        self.attention = Attention(width, 12)
        self.frozen = nn.LayerNorm(width).requires_grad_(False)
        self.up, self.scale, self.inner = nn.Linear(width, 31), Scale(31), nn.Dropout(0.3)
        self.down, self.drop = nn.Linear(31, width), nn.Dropout(0.2)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Any) -> Tensor:
        x = self.embed(tokens)
        x = self.drop(x + self.attention(x))
        return self.head(x + self.down(self.inner(self.scale(self.up(self.frozen(x)).tanh()))))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int], Fields]]] = {
    "gpt": (
        lambda: GPT(VOCAB, LENGTH, layers=2, heads=12, width=24, dropout=0.2),
        NextTokenLoss(),
        tokens,
    ),
    "untied": (
        lambda: GPT(VOCAB, LENGTH, 1, 12, 24, 0.1, bias=False, tie_embeddings=False),
        NextTokenLoss(),
        tokens,
    ),
    "mlp": (lambda: MLP(6, 4, (11, 9, 7)), nn.CrossEntropyLoss(), classes),
    "own": (Own, squares, targets),
}


def make(kind: str, mesh: Mesh, dtype: str = "float64", **options: Any) -> Step:
    model, loss, _ = MODELS[kind]
    given: dict[str, Any] = {"lr": 1e-2, "seed": 3, "microbatch": 2, "grad_clip": CLIP, **options}
    return hpcml.parallelize(
        model().to(np.dtype(dtype)), loss=loss, optimizer=hpcml.optim.AdamW, mesh=mesh,
        groups=decay_matrices, **given,
    )  # fmt: skip


def outputs(step: Step, kind: str) -> list[np.ndarray]:
    """Of the model, for samples and, as text is begun, for the first position alone."""
    inputs = MODELS[kind][2](0)[0][:2]
    short = [] if kind == "mlp" else [inputs[:, :1], inputs[:, :2]]
    return [step.predict(x) for x in [inputs, *short]]


def run(kind: str, mesh: Mesh, **options: Any) -> tuple[Any, ...]:
    step = make(kind, mesh, **options)
    losses, norms = [], []
    for number in range(STEPS):
        losses.append(step(MODELS[kind][2](number)))
        norms.append(step.grad_norm)
    validation = step.evaluate([MODELS[kind][2](9)])
    return losses, norms, validation, values(step), outputs(step, kind)


@cache
def reference(kind: str) -> tuple[Any, ...]:
    return run(kind, serial_mesh())


def same(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    found, expected = run(kind, Mesh(**layout), **options), reference(kind)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-11)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-11)
    assert found[3].keys() == expected[3].keys()
    for name, array in expected[3].items():
        np.testing.assert_allclose(found[3][name], array, rtol=0, atol=1e-11, err_msg=name)
    for mine, theirs in zip(found[4], expected[4], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)


SP = {"sequence_parallel": True}
WAYS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"tp": 1}, {}),
    ({"tp": 2}, {}),
    ({"tp": 2}, SP),
    ({"tp": 2}, {"tensor_split": "naive"}),
    ({"tp": 2}, {"partition_activations": "yes"}),
    ({"tp": 2}, {**SP, "partition_activations": "cpu"}),
    ({"cp": 2}, {}),
    ({"cp": 2}, {"zero": 3}),
    ({"tp": 3}, {}),
    ({"tp": 3}, {**SP, "zero": 2}),
    ({"tp": 3}, {"tensor_split": "naive"}),
    ({"cp": 3}, {"zero": 2}),
    ({"tp": 4}, {}),
    ({"tp": 4}, {**SP, "partition_activations": "yes"}),
    ({"dp": 2, "tp": 2}, {"zero": 1}),
    ({"dp": 2, "tp": 2}, {"zero": 2, "tensor_split": "naive"}),
    ({"dp": 2, "tp": 2}, {**SP, "zero": 2}),
    ({"dp": 2, "tp": 2}, {**SP, "zero": 3, "overlap": True}),
    ({"dp": 2, "tp": 2}, {"zero": 3, "partition_activations": "yes"}),
    ({"dp": 2, "cp": 2}, {"zero": 2}),
    ({"dp": 2, "cp": 2}, {"zero": 1, "shard_ranks": 2}),
    ({"cp": 2, "tp": 2}, SP),
    ({"cp": 2, "tp": 2}, {**SP, "zero": 3, "partition_activations": "yes"}),
    ({"cp": 4}, {"zero": 1}),
    ({"dp": 2, "cp": 2, "tp": 2}, {**SP, "zero": 1}),
    ({"dp": 2, "cp": 2, "tp": 2}, {**SP, "zero": 3, "partition_activations": "yes"}),
]
FOR_SEQUENCES = ("gpt", "untied")


def fits(kind: str, layout: dict[str, int], options: dict[str, Any]) -> bool:
    """MLP has no sequences; own attention and dropout within a region know no other positions."""
    if kind in FOR_SEQUENCES:
        return kind == "gpt" or "sequence_parallel" in options or "cp" in layout
    return "cp" not in layout and (kind == "own" or "sequence_parallel" not in options)


# Every way with GPT and with another model, on threads; with one model each on processes.
TOGETHER = [*(("gpt", *way) for way in WAYS), *in_turn(WAYS, fits, ["untied", "mlp", "own"])]
WITH_MPI = in_turn(WAYS, fits, MODELS)


@cases(("kind", "layout", "options"), TOGETHER, ids=name_of)
def test_training_is_that_of_one_rank(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    """Losses, norms, validation, parameters and outputs, on ranks that are threads."""
    on_threads(lambda: same(kind, layout, options), ranks=ranks_of(layout))


HALVES = [("bfloat16", 2e-2), ("float16", 2e-3)]


@cases(("dtype", "tolerance"), HALVES)
@cases("options", [{}, SP, {**SP, "zero": 3, "partition_activations": "yes"}], ids=name_of)
@cases("layout", [{"tp": 2}, {"cp": 2}, {"dp": 2, "tp": 2}], ids=name_of)
def test_losses_in_16_bits(
    layout: dict[str, int], options: dict[str, Any], dtype: str, tolerance: float
) -> None:
    def program(mesh: Mesh, **given: Any) -> list[float]:
        model = GPT(VOCAB, LENGTH, 2, 4, 24, dropout=0.1).to(hpcml.backend.dtype(dtype))
        step = hpcml.parallelize(
            model, loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, lr=1e-3, seed=3, mesh=mesh,
            **given,
        )  # fmt: skip
        return [step(tokens(number, 4)) for number in range(4)]

    expected = program(serial_mesh())
    for found in on_threads(lambda: program(Mesh(**layout), **options), ranks=ranks_of(layout)):
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@cases("layout", [{"tp": 2}, {"tp": 3}, {"tp": 4}, {"dp": 2, "tp": 2}], ids=name_of)
@cases("kind", MODELS)
def test_first_values_are_those_of_one_rank(kind: str, layout: dict[str, int]) -> None:
    """To the bit, and no rank has made more than its part."""
    expected = values(make(kind, serial_mesh()))

    def program() -> None:
        step = make(kind, Mesh(**layout))
        for name, array in values(step).items():
            assert array.tobytes() == expected[name].tobytes(), name
        for parameter in step.model.parameters():
            assert parameter.part is None or parameter.data.shape == parameter.part.own
        again = make(kind, Mesh(**layout), seed=4)
        again.model.load_state_dict(expected, strict=False)  # a tied head has one name there
        for name, array in values(again).items():
            assert array.tobytes() == expected[name].tobytes(), name

    on_threads(program, ranks=ranks_of(layout))


@pytest.mark.mpi
@cases(("kind", "layout", "options"), WITH_MPI, ids=name_of)
def test_training_with_mpi(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    """Likewise on the processes of mpiexec, on as many ranks as there are."""
    if ranks_of(layout) == Mesh().size > 1:
        same(kind, layout, options)
