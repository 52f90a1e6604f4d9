"""Models that ranks would divide wrongly: refused by name, or computed as on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel import partition
from tests.parallel.cases import serial_mesh, values

cases = pytest.mark.parametrize
VOCAB, LENGTH, WIDTH = 12, 8, 16
SP: dict[str, Any] = {"sequence_parallel": True}
PAIR = {"embed": "vocab", "up": "column", "down": "row", "head": "output"}


class Model(nn.Module):
    """An embedding, something in between, and a head."""

    def __init__(
        self, splits: dict[str, str], within: Callable[[nn.Module, Tensor], Any], **parts: nn.Module
    ) -> None:
        super().__init__()
        self.splits, self.within = {"embed": "vocab", "head": "output", **splits}, within
        self.embed = nn.Embedding(VOCAB, WIDTH)
        for name, part in parts.items():
            setattr(self, name, part)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.within(self, self.embed(tokens)))


class Rotated(nn.PackedAttention):
    """A user's own kind of attention."""

    def forward(self, qkv: Tensor) -> Tensor:
        return super().forward(qkv * 0.5)


class Softer(nn.Dropout):
    """A dropout of another name, but not of another kind."""


def attention(kind: type[nn.PackedAttention] = nn.PackedAttention) -> dict[str, nn.Module]:
    return {"qkv": nn.Linear(WIDTH, 3 * WIDTH), "attend": kind(4, 0.0, True),
            "out": nn.Linear(WIDTH, WIDTH)}  # fmt: skip


def attends(model: Any, x: Tensor) -> Tensor:
    return x + model.out(model.attend(model.qkv(x)))


def pair(inner: int = 24, **more: nn.Module) -> dict[str, nn.Module]:
    return {"up": nn.Linear(WIDTH, inner), "down": nn.Linear(inner, WIDTH), **more}


def drops(model: Any, x: Tensor) -> Tensor:
    return x + model.down(model.drop(model.up(x)))


def batch(step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    made = np.random.default_rng(step).integers(0, VOCAB, (2, 4, LENGTH))
    return made[0], made[1]


def make(model: nn.Module, mesh: Mesh, loss: Any = None, **options: Any) -> hpcml.parallel.Step:
    return hpcml.parallelize(
        model.to(np.float64), loss=loss or NextTokenLoss(), optimizer=hpcml.optim.SGD, lr=0.1,
        seed=5, mesh=mesh, **options,
    )  # fmt: skip


def same(
    model: Callable[[], nn.Module], layout: dict[str, int], loss: Any = None, **options: Any
) -> None:
    """Three steps on ranks are those of one."""

    def program(mesh: Mesh, **given: Any) -> tuple[list[float], dict[str, np.ndarray]]:
        step = make(model(), mesh, loss, **given)
        return [step(batch(number)) for number in range(3)], values(step)

    losses, parameters = program(serial_mesh())
    size = int(np.prod(list(layout.values())))
    for found, mine in on_threads(lambda: program(Mesh(dp=1, **layout), **options), ranks=size):
        np.testing.assert_allclose(found, losses, rtol=1e-12)
        for name, array in parameters.items():
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-12, err_msg=name)


class Two(Model):
    """Two heads, of which one is declared."""

    def __init__(self) -> None:
        super().__init__({}, lambda m, x: x, more=nn.Linear(WIDTH, VOCAB))

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        return self.head(x), self.more(x)


class Summed(Model):
    """A sum over features within a region: each rank has another one, and so another output."""

    def __init__(self) -> None:
        def within(model: Any, x: Tensor) -> Tensor:
            y = model.up(x)
            return x + model.down(y) + y.sum(-1, keepdim=True)

        super().__init__({}, within, **pair())
        self.splits = {"embed": "vocab", "up": "column", "down": "row"}


class Alias(Model):
    def __init__(self) -> None:
        super().__init__({"up": "column", "alias": "row"}, lambda m, x: x, **pair(WIDTH))
        self.alias = self.up


QKV = {"qkv": "qkv", "attend": "heads", "out": "row"}
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, int], dict[str, Any], list[str]]] = {
    "qkv without heads": (
        lambda: Model({"qkv": "qkv", "out": "row"}, attends, **attention()), {"tp": 2}, {},
        ["attend", '"heads"'],
    ),
    "column, not qkv": (
        lambda: Model({**QKV, "qkv": "column"}, attends, **attention()), {"tp": 2}, {},
        ["attend", "2 of 4 heads", '"qkv"'],
    ),
    "attention of another kind": (
        lambda: Model(QKV, attends, **attention(Rotated)), {"tp": 2}, {},
        ["attend", "nn.PackedAttention", "Rotated"],
    ),
    "PyTorch's attention": (
        lambda: Model({"attend": "heads"}, lambda m, x: m.attend(x, x, x)[0],
                      attend=nn.MultiheadAttention(WIDTH, 4, batch_first=True)), {"tp": 2}, {},
        ["attend", "MultiheadAttention"],
    ),
    "attention to some positions": (
        lambda: Model({}, attends, **attention()), {"cp": 2}, {}, ["attend", "some positions"],
    ),
    "the same in regions": (
        lambda: Model({"qkv": "qkv", "out": "row"}, attends, **attention()), {"tp": 2}, SP,
        ["attend", "some positions"],
    ),
    "an embedding of whole sequences": (
        lambda: Model({}, lambda m, x: x + m.more(np.arange(LENGTH)),
                      more=nn.Embedding(LENGTH, WIDTH)), {"cp": 2}, {}, ["more", '"positions"'],
    ),
    "dropout in a region": (
        lambda: Model(PAIR, drops, **pair(drop=nn.Dropout(0.5))), {"tp": 2}, {},
        ["drop", '"divided"'],
    ),
    "a column at the end": (
        lambda: Model({"head": "column"}, lambda m, x: x), {"tp": 2}, {},
        ["Model ends", '"output"', '"row"'],
    ),
    "an output of some positions": (
        Two, {"cp": 2}, {}, ["2 outputs", "1 are", '"output"'],
    ),
    "parts in a whole": (
        Summed, {"tp": 2}, {}, ["different losses", "hpcml check"],
    ),
    "a module of two styles": (
        Alias, {"tp": 2}, {}, ["up", "alias", '"column"', '"row"'],
    ),
    "heads, by name": (
        lambda: Model(QKV, attends, **{**attention(), "attend": nn.PackedAttention(3)}), {"tp": 2},
        {}, ["attend: heads=3"],
    ),
    "a small table, by name": (
        lambda: GPT(2, 4, 1, 3, 9), {"tp": 3}, {},
        ["transformer.wte: num_embeddings=2", "mesh.tp=2"],
    ),
}  # fmt: skip


def loss_of_any(out: Any, target: Any) -> Tensor:
    return (out[0] ** 2).mean() if isinstance(out, tuple) else NextTokenLoss()(out, target)


@cases("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    model, layout, options, words = REFUSED[name]

    def program() -> str:
        with pytest.raises(UserError) as caught:
            make(model(), Mesh(dp=1, **layout), loss_of_any, **options)(batch())
        return str(caught.value)

    size = int(np.prod(list(layout.values())))
    for said in on_threads(program, ranks=size):
        assert "\n" not in said and all(word in said for word in words), said


EQUAL: dict[str, Callable[[], nn.Module]] = {
    "dropout in a sequence": lambda: Model(
        {**PAIR, "drop": "divided"},
        drops,
        **pair(31, drop=nn.Sequential(nn.GELU(), nn.Dropout(0.4))),
    ),
    "dropout of a subclass": lambda: Model(
        {**PAIR, "drop": "divided"}, drops, **pair(drop=Softer(0.4))
    ),
    "dropout between, of a subclass": lambda: Model(
        PAIR, lambda m, x: m.drop(x + m.down(m.up(x))), **pair(drop=Softer(0.4))
    ),
    "dropout of what attention gives": lambda: Model(
        {**QKV, "drop": "divided"},
        lambda m, x: x + m.out(m.drop(m.attend(m.qkv(x)))),
        **attention(), drop=nn.Dropout(0.3),
    ),
    "dropout of nothing in a region": lambda: Model(PAIR, drops, **pair(drop=nn.Dropout(0.0))),
    "dropout of an earlier region": lambda: Model(
        {**PAIR, "drop": "divided", "more": "column", "back": "row"},
        lambda m, x: x + m.back(m.more(m.down(m.drop(m.up(x))))),
        **pair(drop=nn.Dropout(0.4)), more=nn.Linear(WIDTH, 6), back=nn.Linear(6, WIDTH),
    ),
}  # fmt: skip


@cases("layout", [{"tp": 2}, {"tp": 4}], ids=str)
@cases("options", [{}, SP], ids=str)
@cases("name", EQUAL)
def test_computed_as_on_one_rank(name: str, layout: dict[str, int], options: Any) -> None:
    same(EQUAL[name], layout, **options)


class Root(GPT):
    """A parameter of the model itself, which contains everything."""

    def __init__(self) -> None:
        super().__init__(VOCAB, LENGTH, 2, 4, WIDTH, dropout=0.1)
        self.scale = nn.Parameter(shape=(WIDTH,), init=nn.Uniform(1.0))

    def forward(self, tokens: Any) -> Tensor:
        return self.lm_head(self.transformer(tokens) * self.scale)


@cases("model", [Root, lambda: GPT(VOCAB, LENGTH, 2, 4, WIDTH, dropout=0.1)])
@cases("layout", [{"tp": 2}, {"tp": 4}, {"cp": 2, "tp": 2}], ids=str)
@cases("options", [{}, SP], ids=str)
@cases("where", ["yes", "cpu"])
def test_parts_of_activations_however_small(
    monkeypatch: pytest.MonkeyPatch, model: Any, layout: dict[str, int], options: Any, where: str
) -> None:
    """A module with a parameter of its own may contain divided ones: what these save is no copy."""
    monkeypatch.setattr(partition, "SMALLEST", 1)
    same(model, layout, partition_activations=where, **options)


class Channels(nn.Module):
    """Classes along dim 1, as PyTorch has them for sequences."""

    takes_divided_classes = True

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        return self.loss(logits.transpose(1, 2), target)


@cases("layout", [{"tp": 2}, {"tp": 3}, {"cp": 2}], ids=str)
def test_classes_in_the_middle(layout: dict[str, int]) -> None:
    same(lambda: GPT(VOCAB, LENGTH, 1, 6, 12), layout, Channels())


@cases("layout", [{"tp": 2}, {"cp": 2}], ids=str)
def test_targets_that_do_not_fit(layout: dict[str, int]) -> None:
    """One a sequence, one too few, or no integers: an error, not what lies behind the array."""

    def program() -> list[str]:
        step = make(GPT(VOCAB, LENGTH, 1, 2, WIDTH), Mesh(dp=1, **layout))
        tokens, target = batch()
        said = []
        for wrong in (target[:, :-1], target[:, 0], target.astype(np.float32)):
            with pytest.raises((UserError, ValueError, TypeError)) as caught:
                step((tokens, wrong))
            said.append(str(caught.value))
        with pytest.raises(TypeError, match="must be integers"):
            step((tokens.astype(np.float64), target))
        return said

    for short, single, fractions in on_threads(program, ranks=2):
        assert "targets" in short and "targets" in single and "integers" in fractions


def test_a_model_that_cp_divides_is_not_divided_again() -> None:
    def program() -> None:
        model = GPT(VOCAB, LENGTH, 1, 2, WIDTH)
        make(model, Mesh(dp=1, cp=2))
        with pytest.raises(UserError, match="divided among ranks already"):
            make(model, Mesh(dp=2))

    on_threads(program, ranks=2)


def test_two_names_of_a_layer_are_as_good() -> None:
    class Twice(Model):
        def __init__(self) -> None:
            super().__init__({"again": "column", "down": "row"}, drops, **pair(drop=nn.GELU()))
            self.again = self.up

    same(Twice, {"tp": 2})
