"""What cannot be divided is refused in one line with the remedy, on every rank alike."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from hpcml.models import GPT, MLP, NextTokenLoss
from tests.parallel.test_tensor_models import Own

cases = pytest.mark.parametrize


class Two(nn.Module):
    """Two layers, whose splits the tests declare."""

    splits: ClassVar[dict[str, str]] = {}

    def __init__(self, splits: dict[str, str], inner: int = 8, tied: bool = False) -> None:
        super().__init__()
        if splits:
            self.splits = splits
        self.up, self.norm = nn.Linear(8, inner), nn.LayerNorm(inner)
        self.down = nn.Linear(inner, 8)
        if tied:
            self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)) if "norm" in self.splits else self.up(x))


class Strange(nn.Linear):
    """A user's own kind of layer."""

    def forward(self, input: Any) -> Tensor:
        return super().forward(input) * 2.0


class WithStrange(Two):
    def __init__(self) -> None:
        super().__init__({"up": "column", "down": "row"})
        self.up = Strange(8, 8)


def gpt(**options: Any) -> GPT:
    return GPT(13, 6, **{"layers": 1, "heads": 4, "width": 8, **options})


PAIR, SP = {"up": "column", "down": "row"}, {"sequence_parallel": True}
CASES: list[tuple[Any, dict[str, int], dict[str, Any], list[str]]] = [
    (lambda: gpt(heads=2), {"tp": 4}, {}, ["heads=2", "4 ranks", "mesh.tp", "1, 2"]),
    (lambda: gpt(heads=4, width=12), {"tp": 3}, {}, ["heads=4", "3 ranks", "1, 2, 4"]),
    (lambda: Two(PAIR, 3), {"tp": 4}, {}, ["up:", "outputs=3", "mesh.tp=3"]),
    (lambda: Two({}), {"tp": 2}, {}, ["Two declares no splits", "mesh.tp=2", "splits ="]),
    (lambda: MLP(6, 4, ()), {"tp": 2}, {}, ["MLP declares no splits", "mesh.tp=1"]),
    (lambda: Two({"upp": "column"}), {"tp": 2}, {}, ['"upp"', "no module", "up, norm, down"]),
    (lambda: Two({"up": "colum"}), {"tp": 2}, {}, ['"colum" is unknown', "column, row"]),
    (lambda: Two({"norm": "column"}), {"tp": 2}, {}, ["nn.Linear", "norm", "LayerNorm"]),
    (lambda: Two({"norm": "heads"}), {"tp": 2}, {}, ["num_heads", "norm", "LayerNorm"]),
    (WithStrange, {"tp": 2}, {}, ['"column"', "nn.Linear", "up", "Strange"]),
    (lambda: Two(PAIR, 8, True), {"tp": 2}, {}, ["shared and divided already"]),
    (lambda: MLP(6, 4), {"tp": 2}, SP, ["tensor.sequence_parallel", "output and vocab"]),
    (lambda: MLP(6, 4), {"cp": 2}, {}, ["mesh.cp=2", "output and vocab"]),
    (Own, {"cp": 2}, {}, ["mesh.cp=2", "nn.PackedAttention", "attention", "set mesh.cp=1"]),
    (gpt, {"tp": 2}, {"tensor_split": "rows"}, ['tensor.split="rows"', '"naive"']),
    (gpt, {"tp": 2}, {"partition_activations": "all"}, ['"all"', '"cpu"']),
    (gpt, {"tp": 2}, {**SP, "tensor_split": "naive"}, ["naive", "sequence_parallel"]),
    (gpt, {"cp": 2}, {"tensor_split": "naive"}, ["naive", "mesh.cp=2"]),
    (gpt, {"tp": 2}, {"mode": "local", "period": 2}, ["mode=local", "mesh.tp=2", "mode=sync"]),
    (gpt, {"cp": 2}, {"mode": "async"}, ["mode=async", "mesh.cp=2", "mesh.cp=1"]),
]  # fmt: skip


def refusals(model: Any, layout: dict[str, int], options: dict[str, Any]) -> list[str]:
    def program() -> str:
        with pytest.raises(UserError) as caught:
            hpcml.parallelize(
                model(), loss=NextTokenLoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(**layout),
                **options,
            )  # fmt: skip
        return str(caught.value)

    return on_threads(program, ranks=int(np.prod(list(layout.values()))))


@cases(("model", "layout", "options", "words"), CASES)
def test_refused(
    model: Any, layout: dict[str, int], options: dict[str, Any], words: list[str]
) -> None:
    said = refusals(model, layout, options)
    assert said == [said[0]] * len(said)
    assert "\n" not in said[0] and all(word in said[0] for word in words), said[0]


MIXED = [
    ({"up": "column"}, ["down", "Linear of 7", "a part of 7 came", '"row"']),
    ({"down": "row"}, ["down", '"row" of 7 inputs', "all 7 came", '"column"']),
    ({"up": "column", "down": "column"}, ["down", '"column" of 7', "a part of 7", '"row"']),
    ({"up": "column", "norm": "divided", "down": "row"}, ["norm", "LayerNorm of 7", "a part of 7"]),
]


@cases(("splits", "words"), MIXED)
def test_layouts_that_do_not_fit(splits: dict[str, str], words: list[str]) -> None:
    """Said by the first layer that sees them, with its name, before anything is sent."""

    def program() -> str:
        step = hpcml.parallelize(
            Two(splits, 7), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(dp=1, tp=2)
        )
        x = np.ones((4, 8), np.float32)
        with pytest.raises((UserError, ValueError)) as caught:
            step((x, x))
        return str(caught.value)

    said = on_threads(program, ranks=2)
    assert said == [said[0]] * 2  # though the ranks' parts, of 7, are not
    assert "\n" not in said[0] and all(word in said[0] for word in words), said[0]


def test_a_divided_model_is_not_divided_again() -> None:
    def program() -> None:
        model, mesh = gpt(), Mesh(dp=1, tp=2)
        options = {"loss": NextTokenLoss(), "optimizer": hpcml.optim.SGD}
        hpcml.parallelize(model, mesh=mesh, **options)
        with pytest.raises(UserError, match="divided among ranks already"):
            hpcml.parallelize(model, mesh=mesh, **options)

    on_threads(program, ranks=2)


def test_hooks_stay_where_they_were() -> None:
    """And a module that is used twice is divided once."""

    def program() -> list[str]:
        seen: list[str] = []
        model = gpt(layers=2)
        for _, module in model.named_modules():
            module.register_forward_hook(lambda m, *_: seen.append(m.name))
        before = [name for name, _ in model.named_modules()]
        step = hpcml.parallelize(
            model, loss=NextTokenLoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(dp=1, tp=2)
        )
        assert [name for name, _ in model.named_modules()] == before
        tokens = np.zeros((2, 6), np.int64)
        step((tokens, tokens))
        return seen

    for seen in on_threads(program, ranks=2):
        assert {"lm_head", "transformer.wte", "transformer.h.1.attn.c_proj"} <= set(seen)
