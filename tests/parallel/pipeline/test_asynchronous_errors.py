"""What asynchronous pipelines refuse, and what goes wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import NonFiniteError, UserError
from hpcml.models import GPT, NextTokenLoss
from tests.parallel.cases import LENGTH, VOCAB, classes, tokens, values
from tests.parallel.pipeline.asynchronous import MODELS, RULES, make, set_rate

cases = pytest.mark.parametrize


def refused(kind: str, mesh: dict[str, Any], **options: Any) -> str:
    """What all ranks are told, in one line."""

    def program() -> str:
        with pytest.raises(UserError) as caught:
            make(kind, Mesh(**mesh), **options)
        return str(caught.value)

    said = on_threads(program, ranks=mesh.get("pp", 1) * mesh.get("dp", 1))
    assert len(set(said)) == 1 and "\n" not in said[0]
    return said[0]


@cases("rule", RULES)
def test_what_needs_all_gradients_at_once_is_refused(rule: str) -> None:
    name, layout = RULES[rule]["schedule"], {"dp": 1, "pp": 2}
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"grad_clip": 0.5}, layout, "grad_clip=0.5"),
        ({"zero": 1}, {"dp": 2, "pp": 2}, "zero=1"),
        ({"zero": 3}, layout, "zero=3"),
        ({"dtype": "float16"}, layout, "float16"),
        ({}, {**layout, "deterministic": True}, "run.deterministic=true"),
        ({}, {"dp": 1, "pp": 1}, "mesh.pp=1"),
    ]
    for options, mesh, word in wrong:
        said = refused("mlp", mesh, **RULES[rule], **options)
        assert word in said and name in said and "1f1b" in said, said


def test_tied_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = (lambda: GPT(VOCAB, LENGTH, 3, 2, 8), NextTokenLoss(), tokens, "float32")
    monkeypatch.setitem(MODELS, "tied", tied)
    said = refused("tied", {"dp": 1, "pp": 3}, schedule="pipedream")
    assert "transformer.wte.weight" in said and "ranks 0 and 2" in said
    assert "tie_embeddings=false" in said


def test_options_of_other_schedules_are_refused(tmp_path: Path) -> None:
    layout = {"dp": 1, "pp": 2}
    for schedule in ("1f1b", "pipedream-2bw"):
        said = refused("mlp", layout, schedule=schedule, vertical_sync=True)
        assert "vertical_sync" in said and schedule in said
    assert "chunks=2" in refused("mlp", layout, schedule="pipedream", chunks=2)
    own = tmp_path / "own.txt"
    own.write_text("weights: stashed\n0F0 0B0 0U0 0F1 0B1 0U1\n1F0 1B0 1U0 1F1 1B1 1U1\n")
    assert "pipedream" in refused("mlp", layout, schedule=str(own))


def test_batches_of_2bw_must_fit() -> None:
    """Long enough for the weights that they need, and as long as each other."""

    def program() -> None:
        step = make("mlp", Mesh(dp=1, pp=4), **RULES["double"])
        with pytest.raises(UserError, match=r"2 microbatches a batch .* 3 or more"):
            step.plan(2)
        with pytest.raises(UserError, match=r"2 microbatches a batch .* 3 or more"):
            step(classes(0, 2))
        step.plan(4)
        step(classes(0, 4))
        with pytest.raises(UserError, match=r"5 microbatches after one of 4 .* settle\(\)"):
            step(classes(1, 5))
        step.settle()
        step(classes(1, 5))
        with pytest.raises(UserError, match=r"no_sync\(\)"):
            step.no_sync()

    on_threads(program, ranks=4)


@cases("rule", RULES)
def test_a_loss_that_is_no_number_is_told_by_all_ranks(rule: str) -> None:
    """In the same call; nobody waits for the others afterwards."""

    def program() -> tuple[str, int]:
        step = make("mlp", Mesh(dp=1, pp=3), "sgd", **RULES[rule])
        step(classes(0, 4))
        set_rate(step, 1e200)
        with pytest.raises(NonFiniteError, match="is not finite") as caught:
            [step(classes(number, 4)) for number in range(1, 5)]
        assert not all(np.isfinite(array).all() for array in values(step).values())
        return str(caught.value), step.steps

    said = on_threads(program, ranks=3, timeout=20)
    assert said == [said[0]] * 3 and said[0][1] >= 1


@cases("where", ["forward", "backward", "update"])
def test_a_rank_that_raises_ends_all(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second call, in which all have microbatches under way."""

    def trouble(*_: Any) -> None:
        raise RuntimeError("trouble")

    def program() -> None:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES["stashed"])
        step(classes(0, 4))
        if step.mesh["pp"].rank == 1:
            (stage,) = step.assembly.stages.values()
            if where == "forward":
                stage.links[0].modules[0].register_forward_hook(trouble)
            elif where == "backward":
                stage.parameters[0].register_post_accumulate_grad_hook(trouble)
            else:
                step.optimizer.update = trouble
        step(classes(1, 4))

    with pytest.raises(RuntimeError, match="trouble"):
        on_threads(program, ranks=3, timeout=20)
