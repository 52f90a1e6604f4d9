"""Where models are cut, what is refused before anything runs, and what goes wrong on one stage."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import hpcml
from hpcml import memory, nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.comm.alone import Alone
from hpcml.errors import NonFiniteError, UserError
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.parallel.pipeline.assemble import placement
from hpcml.parallel.pipeline.chain import links
from hpcml.parallel.pipeline.partition import cost, measured, stages
from hpcml.parallel.replicas import ReplicaError
from tests.parallel.cases import values
from tests.parallel.pipeline.test_training import MODELS, make

cases = pytest.mark.parametrize


def gpt(layers: int = 4, **options: Any) -> GPT:
    return GPT(13, 7, layers, 2, 8, **options).name_parts()


class Chained(nn.Module):
    """With a chain that tests give."""

    def __init__(self, *chain: str) -> None:
        super().__init__()
        if chain:
            self.chain = chain
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.more = nn.ModuleList([nn.Linear(3, 3), nn.ReLU()])
        self.number = 1.0

    def begin(self, x: Tensor) -> Tensor:
        return self.first(x)

    def end(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_links_of_a_model() -> None:
    """A module has what is below it, a method what is left of its owner."""
    found = {link.name: link for link in links(gpt(2))}
    assert list(found) == ["transformer.embed", "transformer.h.0", "transformer.h.1",
                           "transformer.ln_f", "lm_head"]  # fmt: skip
    names = {name: [p.name for p in link.parameters] for name, link in found.items()}
    assert names["transformer.embed"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert names["lm_head"] == ["transformer.wte.weight"]  # tied
    assert len(names["transformer.h.1"]) == 12
    numbers = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).name_parts()
    assert [link.name for link in links(numbers)] == ["0", "1"]


def test_another_thing_of_that_name_is_no_declaration() -> None:
    """A user's model may call its layers as it likes, and train in deterministic mode."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            self.splits, self.units = 3, 64

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x)

    with pytest.raises(UserError, match="Other declares no chain"):
        links(Other())
    step = hpcml.parallelize(
        Other(),
        loss=nn.MSELoss(),
        optimizer=hpcml.optim.SGD,
        mesh=Mesh(Alone(), deterministic=True),
    )
    x = np.ones((2, 3), np.float32)
    assert np.isfinite(step((x, x)))


WRONG: list[tuple[tuple[str, ...], list[str]]] = [
    ((), ["Chained declares no chain", "chain ="]),
    (("first", "secnd"), ['"secnd"', "neither a module nor a method"]),
    (("first", "second", "more.*", "number"), ['"number"', "neither"]),
    (("first", "second", "others.*"), ['"others.*"', "first, second"]),
    (("first", "second", "more.*", "first"), ['"first"', "2 times"]),
    (("first", "more.*"), ["second.weight", "add its module"]),
    (("begin", "end"), ['"begin"', '"end"', '"first"', "make a module"]),
]


@cases(("chain", "words"), WRONG)
def test_a_chain_that_does_not_fit(chain: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        links(Chained(*chain).name_parts())
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    """It is in the chain under both names, so one that learns is refused, not left out."""
    once, act = nn.Linear(3, 3), nn.ReLU()
    found = links(nn.Sequential(once, act, nn.Linear(3, 3), act).name_parts())
    assert [link.name for link in found] == ["0", "1", "2", "3"]
    twice = nn.Sequential(once, act, once).name_parts()
    with pytest.raises(UserError, match='"0" and "2" both have the module "0"'):
        links(twice)
    mesh = Mesh(Alone(), deterministic=True)  # where nothing need be cut it can be trained
    step = hpcml.parallelize(twice, loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=mesh)
    x = np.ones((2, 3), np.float32)
    assert np.isfinite(step((x, x)))


@cases("count", [1, 2, 3, 4, 5])
@cases("layers", [3, 4, 5])
def test_stages_are_balanced(layers: int, count: int) -> None:
    """The largest cost is the least that any cuts give."""
    chain = links(gpt(layers))
    found = stages(chain, count)
    assert [link for stage in found for link in stage.links] == chain
    most = max(sum(cost(link) for link in stage.links) for stage in found)
    best = min(
        max(
            sum(map(cost, chain[a:b])) for a, b in zip((0, *cuts), (*cuts, len(chain)), strict=True)
        )
        for cuts in combinations(range(1, len(chain)), count - 1)
    )
    assert most == best and all(stage.parameters for stage in found)


def test_stages_of_equal_time() -> None:
    """By costs that are given, and by those that are measured, of every link."""
    chain = links(gpt())
    found = stages(chain, 3, (), [9, 1, 1, 1, 1, 1, 1])
    assert [len(stage.links) for stage in found] == [1, 3, 3]
    model = gpt(6)
    seconds = measured(model, [np.zeros((2, 7), np.int64)])
    assert len(seconds) == len(links(model)) and min(seconds) > 0
    assert all(parameter._array is None for parameter in model.parameters())
    with pytest.raises(UserError, match="2 costs for 7 links"):
        stages(chain, 3, (), [1, 2])


def test_stages_without_parameters_are_avoided() -> None:
    chain = links(MLP(3, 2, (4, 4)).name_parts())
    assert [link.name for link in chain][:3] == ["flatten", "layers.0", "layers.1"]
    for count in (1, 2, 3):
        assert all(stage.parameters for stage in stages(chain, count))
    with pytest.raises(UserError, match="4 stages, but only 3 links have parameters"):
        stages(chain, 4)
    with pytest.raises(UserError, match=r"stage 0 \(flatten\) has no parameters"):
        stages(chain, 2, [1])


@cases(
    ("where", "words"),
    [
        ([1], ["begins 2 stages", "there are 3"]),
        ([2, 1], ["begins after the one before"]),
        ([0, 1], ["begins after"]),
        ([2, 9], ["from 1 to 6"]),
        (["transformer.h.1", "head"], ['"head" is no link', "lm_head"]),
    ],
)
def test_cuts_that_do_not_fit(where: list[int | str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        stages(links(gpt()), 3, where)
    assert all(word in str(caught.value) for word in words), caught.value


def test_cuts_by_name_and_by_number() -> None:
    chain = links(gpt())
    by_name = stages(chain, 3, ["transformer.h.1", "lm_head"])
    first = [stage.links[0].name for stage in by_name]
    assert first == ["transformer.embed", "transformer.h.1", "lm_head"]
    assert by_name == stages(chain, 3, [2, 6])


def half_frozen() -> GPT:
    model = gpt(tie_embeddings=False)
    for part in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
        part.requires_grad_(False)
    return model


REFUSED: list[tuple[Callable[[], nn.Module], int, dict[str, Any], list[str]]] = [
    (lambda: gpt(1), 4, {"schedule": "interleaved"}, ["8 stages", "4 links", "mesh.pp"]),
    (gpt, 2, {"schedule": "1f2b"}, ['"1f2b"', "1f1b"]),
    (gpt, 2, {"chunks": 2}, ["chunks=2", "1f1b", "interleaved"]),
    (gpt, 2, {"stages": ["transformer.h.9"]}, ['"transformer.h.9" is no link']),
    (lambda: Chained(), 2, {}, ["declares no chain", "mesh.pp=1"]),
    (lambda: gpt(2).requires_grad_(False), 2, {}, ["no parameter requires a gradient"]),
    (half_frozen, 3, {}, ["rank 0 of the pipeline has nothing to train", "transformer.embed"]),
    (gpt, 2, {"mode": "local", "period": 2}, ["mode=local", "mesh.pp=2"]),
]  # fmt: skip


@cases(("model", "ranks", "options", "words"), REFUSED)
def test_refused_on_all_ranks_alike(
    model: Callable[[], nn.Module], ranks: int, options: dict[str, Any], words: list[str]
) -> None:
    def program() -> str:
        with pytest.raises((UserError, ValueError)) as caught:
            hpcml.parallelize(
                model(), loss=NextTokenLoss(), optimizer=hpcml.optim.SGD,
                mesh=Mesh(dp=1, pp=ranks), **options,
            )  # fmt: skip
        return str(caught.value)

    said = on_threads(program, ranks=ranks)
    assert "\n" not in said[0] and all(word in said[0] for word in words), said[0]


@cases(
    ("table", "words"),
    [
        ("0F0 0F1 0B0\n1F0 1B0 1F1 1B1\n", ["0B1"]),
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1\n", ["deadlock"]),
        ("0F0 0B0\n1F0 1B0\n", ["microbatches"]),
    ],
)
def test_a_schedule_that_is_wrong_says_so_before_anything_runs(
    tmp_path: Path, table: str, words: list[str]
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(table)

    def program() -> str:
        with pytest.raises(UserError) as caught:
            make("gpt", Mesh(dp=1, pp=2), schedule=str(file)).plan(2)
        return str(caught.value)

    for said in on_threads(program, ranks=2):
        assert "\n" not in said and all(word in said for word in words), said


def test_a_folder_of_that_name_is_no_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("interleaved").mkdir()
    assert placement("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)


def test_microbatches_that_do_not_fit_the_schedule() -> None:
    def program() -> str:
        step = make("gpt", Mesh(dp=1, pp=2), schedule="interleaved", chunks=2)
        step.plan(4)
        with pytest.raises(UserError) as caught:
            step.plan(5)
        return str(caught.value)

    for said in on_threads(program, ranks=2):
        assert "5 microbatches" in said and "multiple of 2" in said


# --- what a stage alone sees --------------------------------------------------------------------


def test_values_of_other_stages_are_not_to_be_had_here() -> None:
    def program() -> None:
        step = make("gpt", Mesh(dp=1, pp=2))
        with pytest.raises(UserError, match="is on another rank of the pipeline"):
            step.model.state_dict()
        with pytest.raises(UserError, match="is on another rank of the pipeline"):
            hpcml.parallelize(step.model, optimizer=hpcml.optim.SGD, mesh=Mesh(dp=1, pp=2))

    on_threads(program, ranks=2)


@cases("name", ["transformer.wte.weight", "transformer.h.2.attn.c_attn.weight", "lm_head.weight"])
def test_what_is_not_finite_is_named_on_all_ranks(name: str) -> None:
    def program() -> str:
        step = make("untied", Mesh(dp=1, pp=3))
        found = values(step)
        found[name].reshape(-1)[0] = np.nan
        step.model.load_state_dict(found)
        with pytest.raises(NonFiniteError) as caught:
            step(MODELS["untied"][2](0))
        return str(caught.value)

    said = on_threads(program, ranks=3)
    assert said == [said[0]] * 3 and f"parameter {name} is not finite: 1 nan" in said[0]


def test_the_first_output_that_is_not_finite_is_named() -> None:
    def program() -> str:
        step = make("untied", Mesh(dp=1, pp=3), "float32")
        found = values(step)
        found["transformer.h.1.mlp.c_fc.weight"][0] = 3e38
        found["transformer.h.1.ln_2.weight"][...] = 1e3
        step.model.load_state_dict(found)
        with pytest.raises(NonFiniteError) as caught:
            step(MODELS["untied"][2](0))
        return str(caught.value)

    said = on_threads(program, ranks=3)
    assert said == [said[0]] * 3 and "output of transformer.h.1.mlp.c_fc" in said[0]


def test_copies_of_a_stage_that_drift_are_found() -> None:
    def program() -> str:
        mesh = Mesh(dp=2, pp=2)
        step = make("gpt", mesh)
        step.check_replicas()
        if mesh.rank == 3:
            step.optimizer.storage.buckets[0].data[0] += 1e-9
        with pytest.raises(ReplicaError) as caught:
            step.check_replicas()
        return str(caught.value)

    said = on_threads(program, ranks=4)
    assert said == [said[0]] * 4 and "replicas along dp have drifted apart" in said[0]


def test_an_error_in_a_later_stage_ends_a_trial_on_all_ranks() -> None:
    """As `hpcml train` tries two samples first: nobody waits for what does not come."""

    class Wrong(nn.Module):
        chain: ClassVar = ("a", "b", "c")

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def program() -> str:
        step = hpcml.parallelize(
            Wrong(), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, mesh=Mesh(dp=1, pp=3)
        )
        try:
            step.try_batch([np.ones((2, 3), np.float32), np.ones((2, 2), np.float32)])
        except (UserError, ValueError) as error:
            return str(error)
        return ""

    first, second, third = on_threads(program, ranks=3)
    assert first == "" and "linear(x (2, 4)" in second and second == third


@cases(
    ("schedule", "activations", "peaks"),
    [("gpipe", "keep", [6, 6]), ("1f1b", "keep", [2, 1]), ("naive", "keep", [1, 1]),
     ("gpipe", "drop", [1.2, 6]), ("gpipe", "offload", [1.6, 1.7])],
)  # fmt: skip
def test_activations_that_wait_are_those_of_the_schedule(
    schedule: str, activations: str, peaks: list[float]
) -> None:
    """Peak of memory in units of a microbatch: M for GPipe, min(K - s, M) for 1F1B.

    Where they are dropped or moved, inputs and outputs of stages are left beside one that is there.
    """

    def program() -> float:
        mesh = Mesh(dp=1, pp=2)
        model = GPT(16, 64, 8, 2, 64, tie_embeddings=False)
        step = hpcml.parallelize(
            model, loss=NextTokenLoss(), optimizer=hpcml.optim.SGD, mesh=mesh, microbatch=1,
            schedule=schedule, stages=[5], activations=activations,
        )  # fmt: skip
        tokens = np.random.default_rng(0).integers(0, 16, (2, 6, 64))
        peak = []
        for size in (1, 6):
            step((tokens[0, :size], tokens[1, :size]))
            memory.account().reset_peak()
            before = memory.account().live["activations"]
            step((tokens[0, :size], tokens[1, :size]))
            peak.append(memory.account().peak["activations"] - before)
        return peak[1] / peak[0]

    for found, expected in zip(on_threads(program, ranks=2), peaks, strict=True):
        # Beside what waits lies what backward makes, which does not grow.
        assert 0.75 * expected <= found <= 1.15 * expected, (found, expected)
