"""Asynchronous pipelines beside one process that keeps all versions of all weights in lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import hpcml
from hpcml import memory, nn, rng
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.comm.faults import Delay, Reorder, Synchronous
from hpcml.errors import NonFiniteError, UserError
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.optim import SGD, AdamW
from hpcml.parallel import Step, offload
from hpcml.parallel.pipeline import Schedule, find, lower, simulate
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

cases = pytest.mark.parametrize
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
        _set(step, rate)
        losses.append(step(batch))
    return Trace(losses, values(step))


def _set(step: Step, rate: float | None) -> None:
    for group in step.optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate


# --- the same by one process --------------------------------------------------------------------


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
        _set(step, rate)
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


LONG = Feed((3, 3, 3, 3))
UNEVEN = Feed((5, 5, 5, 5), microbatch=2)
SETTLING = Feed((4, 4, None, 4, 4, None, 4), rates=(0.1, 0.03, 0.2, 0.01, 0.1))
LAYOUTS = [(kind, rule, n) for kind in MODELS for rule in RULES for n in (2, 3, 4)]


def _go(kind: str, rule: str, n: int, feed: Feed, optimizer: str, **options: Any) -> None:
    found = trained(kind, Mesh(dp=1, pp=n), feed, optimizer=optimizer, **RULES[rule], **options)
    same(found, simulated(kind, n, rule, feed, optimizer))


@cases(("kind", "rule", "n"), LAYOUTS)
def test_weights_follow_the_formula(kind: str, rule: str, n: int) -> None:
    """Every bit; calls do not empty the pipeline, so that they are one long run."""
    on_threads(lambda: _go(kind, rule, n, LONG, "adamw"), ranks=n)


@pytest.mark.mpi
@cases(("kind", "rule", "n"), LAYOUTS)
def test_weights_follow_the_formula_with_mpi(kind: str, rule: str, n: int) -> None:
    if Mesh().size == n:
        _go(kind, rule, n, LONG, "momentum")
        _go(kind, rule, n, SETTLING, "adamw")


@cases("optimizer", ["sgd", "momentum"])
@cases("rule", RULES)
def test_other_optimizers(rule: str, optimizer: str) -> None:
    on_threads(lambda: _go("mlp", rule, 3, LONG, optimizer), ranks=3)


@cases("feed", [
    UNEVEN, SETTLING, Feed((7, 7)), Feed((3, 3, 3, 3), 0), Feed((2,) * 7), Feed((1,) * 6),
    Feed((2, 1, 4, 3, 1, 1, 5)), Feed((9, 2, None, 2, 3), 2),
])  # fmt: skip
@cases("rule", RULES)
def test_batches_of_any_size(rule: str, feed: Feed) -> None:
    """And microbatches, those that do not divide it too; learning rates go with the batch."""
    n = 2 if rule == "double" else 3
    if rule == "double" and len(set(feed.sizes) - {None}) > 1:
        pytest.skip("batches of one size")
    feed = feed._replace(microbatch=feed.microbatch or max(s for s in feed.sizes if s))
    on_threads(lambda: _go("gpt", rule, n, feed, "sgd"), ranks=n)


@cases(("rule", "options"), [
    ("stashed", {"activations": "drop"}), ("vertical", {"activations": "drop"}),
    ("stashed", {"activations": "offload"}), ("stashed", {"dtype": "bfloat16"}),
    ("double", {"dtype": "bfloat16"}), ("stashed", {"stages": ("transformer.h.0",)}),
], ids=str)  # fmt: skip
def test_with_other_options(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward again is with the weights of the first time; versions of 16 bits are of 16 bits."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    kept = {name: value for name, value in options.items() if name == "dtype"}

    def program() -> None:
        found = trained("gpt", Mesh(dp=1, pp=2), **RULES[rule], **options)
        same(found, simulated("gpt", 2, rule, where=options.get("stages", ()), **kept))

    on_threads(program, ranks=2)


@cases("rule", RULES)
@cases("layout", [{"dp": 2, "pp": 2}, {"dp": 1, "pp": 2, "tp": 2}, {"dp": 1, "pp": 2, "cp": 2}])
def test_with_other_axes(layout: dict[str, int], rule: str) -> None:
    """Data-parallel ranks make an update of a microbatch each, the mean over their samples."""
    options = {"overlap": True} if layout["dp"] > 1 else {}
    feed = Feed((6, 6, 6), microbatch=2) if rule == "double" else Feed((5, 5, 5), microbatch=1)
    expected = simulated("gpt", 2, rule, feed, "sgd", ranks=layout["dp"], dtype="float64")

    def program() -> None:
        found = trained("gpt", Mesh(**layout), feed, optimizer="sgd", dtype="float64",
                        **RULES[rule], **options)  # fmt: skip
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
        for name, array in expected.parameters.items():
            np.testing.assert_allclose(found.parameters[name], array, rtol=0, atol=1e-12)

    on_threads(program, ranks=4)


@cases("rule", RULES)
def test_on_networks_that_are_slow_or_buffer_nothing(rule: str) -> None:
    faults = [Delay(0.002, seed=1), Reorder(seed=2), Synchronous()]
    on_threads(lambda: _go("mlp", rule, 3, LONG, "adamw"), ranks=3, faults=faults, timeout=20)


# --- what is kept, and when ---------------------------------------------------------------------


def table(rule: str, n: int, batches: int, microbatches: int) -> Schedule:
    options = {"update_every": microbatches} if rule == "double" else {}
    options |= {"vertical_sync": True} if rule == "vertical" else {}
    return find(RULES[rule]["schedule"], n, batches * microbatches, **options)


@cases("n", [2, 3, 4])
@cases("rule", RULES)
def test_as_many_versions_as_the_simulator_says(rule: str, n: int) -> None:
    """Bytes of the parameters, at their peak too; after settling there is one version."""
    expected = simulate(lower(table(rule, n, 5, 4))).versions

    def program() -> None:
        account = memory.account()
        before = account.live["params"]
        step = make("mlp", Mesh(dp=1, pp=n), microbatch=1, **RULES[rule])
        size = step.optimizer.storage.data.nbytes
        assert account.live["params"] - before == size
        account.reset_peak()
        for number in range(5):
            step(classes(number, 4))
        versions = expected[step.mesh["pp"].rank]
        assert account.live["params"] - before == account.peak["params"] - before == versions * size
        step.settle()
        assert account.live["params"] - before == size

    on_threads(program, ranks=n)


def test_the_pipeline_stays_full_between_calls() -> None:
    """Each rank is as many updates behind as microbatches are under way from it on."""

    def program() -> list[int]:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES["stashed"])
        made = []
        for number in range(3):
            step(classes(number, 4))
            made.append(step.optimizer.steps)
        assert step.steps == 3
        step.settle()
        step.settle()  # there is nothing left
        return [*made, step.optimizer.steps]

    assert on_threads(program, ranks=3) == [[1, 5, 9, 12], [2, 6, 10, 12], [3, 7, 11, 12]]


@cases("rule", RULES)
def test_evaluation_is_of_all_updates(rule: str) -> None:
    """As by a plain model with the values that training would end with."""

    def program() -> None:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES[rule])
        for number in range(3):
            step(classes(number, 4))
        found = step.evaluate([classes(9, 4), classes(10, 3)])
        outputs = step.predict(classes(9, 4)[0])
        plain = make("mlp", serial_mesh())
        plain.model.load_state_dict(values(step))
        assert found == pytest.approx(plain.evaluate([classes(9, 4), classes(10, 3)]), rel=1e-13)
        np.testing.assert_allclose(outputs, plain.predict(classes(9, 4)[0]), rtol=1e-13)
        step.check_replicas()
        expected = simulated("mlp", 3, rule, Feed((4, 4, 4)))
        same(Trace(expected.losses, values(step)), expected)

    on_threads(program, ranks=3)


@cases("rule", RULES)
def test_it_learns(rule: str) -> None:
    """Which of three numbers is the largest."""

    def program() -> list[float]:
        model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                              nn.Linear(16, 3))  # fmt: skip
        step = hpcml.parallelize(
            model, loss=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, momentum=0.5,
            mesh=Mesh(dp=1, pp=3), seed=1, microbatch=8, **RULES[rule],
        )  # fmt: skip
        losses = []
        for number in range(60):
            x = np.random.default_rng([9, number]).normal(size=(32, 3))
            losses.append(step((x, x.argmax(axis=1))))
        return losses

    losses = on_threads(program, ranks=3)[0]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_the_norm_is_that_of_the_newest_gradients() -> None:
    """Of the last stage of the batch's last microbatch but one, of those before of earlier ones."""

    def program() -> list[float]:
        step = make("mlp", Mesh(dp=1, pp=3), **RULES["stashed"])
        norms = []
        for number in range(3):
            step(classes(number, 4))
            norms.append(step.grad_norm)
        return norms

    squares = simulated("mlp", 3, "stashed", Feed((4, 4, 4))).squares
    newest = [[squares[end - 4 + stage][stage] for stage in range(3)] for end in (4, 8, 12)]
    expected = [sum(stages) ** 0.5 for stages in newest]
    assert on_threads(program, ranks=3) == [pytest.approx(expected, rel=1e-12)] * 3


# --- what is refused, and what goes wrong -------------------------------------------------------


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
        _set(step, 1e200)
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
