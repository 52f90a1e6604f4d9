"""Training in stages beside the same training by one process, batch by batch and bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.comm.alone import Alone
from hpcml.models import GPT, MLP, NextTokenLoss
from hpcml.parallel import Step, offload
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


@pytest.fixture(autouse=True)
def offload_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small."""
    monkeypatch.setattr(offload, "SMALLEST", 1)


STEPS = 3


class Own(nn.Module):
    """A user's own model: two tensors and integers between stages, an input that is passed on, a
    layer that no stage uses a gradient of, and links that share parameters: two of them, all three
    of them, one that is frozen."""

    chain = ("split", "left", "mix", "blocks.*", "head")
    splits = {"left.up": "column", "left.down": "row"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.left = Left()
        self.mix = Mix()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.blocks[1].weight = self.blocks[2].weight = self.blocks[0].weight
        self.blocks[2].bias = self.blocks[0].bias
        self.blocks[1].bias = self.mix.frozen.bias
        self.head = nn.Linear(8, 5)

    def split(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        return x, x * 2.0, Tensor(np.asarray(tokens.data) % 3)

    def forward(self, tokens: Any) -> Tensor:
        x = self.mix(*self.left(*self.split(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mix(nn.Module):
    """Three into one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.scale = nn.Linear(8, 8).requires_grad_(False), nn.LayerNorm(8)

    def forward(self, x: Tensor, y: Tensor, kinds: Tensor) -> Tensor:
        return self.scale(self.frozen(x - y)) * (kinds.data[..., None] + 1).astype(x.dtype)


class Left(nn.Module):
    """Changes the first of three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 12), nn.Linear(12, 8), nn.Dropout(0.3)

    def forward(self, x: Tensor, y: Tensor, kinds: Tensor) -> Any:
        return self.drop(self.down(self.up(x).tanh())), y, kinds


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Fields]]] = {
    "gpt": (lambda: GPT(VOCAB, LENGTH, 6, 4, 8, dropout=0.2), NextTokenLoss(), tokens),
    "untied": (
        lambda: GPT(VOCAB, LENGTH, 4, 4, 8, 0.1, bias=False, tie_embeddings=False),
        NextTokenLoss(), tokens,
    ),
    "mlp": (lambda: MLP(6, 4, (11, 9, 7, 8)), nn.CrossEntropyLoss(), classes),
    "own": (Own, squares, targets),
}  # fmt: skip


def make(kind: str, mesh: Mesh, dtype: str = "float64", **options: Any) -> Step:
    model, loss, _ = MODELS[kind]
    given: dict[str, Any] = {"lr": 1e-2, "seed": 3, "microbatch": 1, "grad_clip": CLIP, **options}
    return hpcml.parallelize(
        model().to(np.dtype(dtype)), loss=loss, optimizer=hpcml.optim.AdamW, mesh=mesh,
        groups=decay_matrices, **given,
    )  # fmt: skip


def run(kind: str, mesh: Mesh, size: int = 5, **options: Any) -> tuple[Any, ...]:
    step = make(kind, mesh, **options)
    batch = MODELS[kind][2]
    losses, norms = [], []
    for number in range(STEPS):
        losses.append(step(batch(number, size)))
        norms.append(step.grad_norm)
    gradients = {name: array.copy() for name, array in step.gathered_gradients()}
    validation = step.evaluate([batch(9, size), batch(10, 3)])
    inputs = batch(0, 3)[0]
    return losses, norms, validation, values(step), gradients, step.predict(inputs)


@cache
def reference(kind: str, size: int) -> tuple[Any, ...]:
    return run(kind, serial_mesh(), size)


def same(kind: str, layout: dict[str, int], options: dict[str, Any], size: int = 5) -> None:
    found, expected = run(kind, Mesh(**layout), size, **options), reference(kind, size)
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11)
    for mine, theirs in zip(found[3:5], expected[3:5], strict=True):
        assert mine.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-11, err_msg=name)
    np.testing.assert_allclose(found[5], expected[5], rtol=0, atol=1e-10)


SP = {"sequence_parallel": True}
INTERLEAVED = {"schedule": "interleaved", "chunks": 2}
WAYS: list[tuple[dict[str, int], dict[str, Any]]] = [
    *(({"pp": 2}, {"schedule": name}) for name in ("naive", "gpipe", "1f1b", "zero-bubble")),
    ({"pp": 2}, {"stages": [2]}),
    ({"pp": 2}, {"zero": 3}),
    ({"pp": 2}, {"microbatch": 2}),
    ({"pp": 3}, {}),
    ({"pp": 3}, {"schedule": "zero-bubble"}),
    ({"pp": 3}, {"schedule": "gpipe", "microbatch": 0}),
    ({"pp": 4}, {"schedule": "1f1b"}),
    ({"pp": 4}, {"schedule": "zero-bubble"}),
    ({"dp": 2, "pp": 2}, {"zero": 1}),
    ({"dp": 2, "pp": 2}, {"zero": 1, "overlap": True}),
    ({"dp": 2, "pp": 2}, {"zero": 2, "schedule": "gpipe"}),
    ({"dp": 2, "pp": 2}, {"zero": 3, "schedule": "zero-bubble"}),
    ({"dp": 2, "pp": 2}, {"zero": 3, "overlap": True}),
    ({"dp": 2, "pp": 2}, {"zero": 1, "zero_split": "layers"}),
    ({"pp": 2, "tp": 2}, {}),
    ({"pp": 2, "tp": 2}, {**SP, "schedule": "zero-bubble"}),
    ({"pp": 2, "tp": 2}, {**SP, "overlap": True, "schedule": "zero-bubble"}),
    ({"pp": 2, "tp": 2}, {**SP, "zero": 3, "partition_activations": "yes"}),
    ({"pp": 2, "cp": 2}, {"zero": 2}),
    ({"pp": 2, "dp": 2, "tp": 2}, {**SP, "zero": 2}),
    ({"pp": 2, "dp": 2, "tp": 2}, {"zero": 3, "schedule": "zero-bubble"}),
    ({"pp": 2}, {"activations": "drop"}),
    ({"pp": 2}, {"activations": "offload"}),
    ({"pp": 3}, {"activations": "drop", "schedule": "zero-bubble", "zero": 3}),
    ({"pp": 3}, {"activations": "offload", "schedule": "zero-bubble"}),
    ({"pp": 2, "tp": 2}, {**SP, "activations": "drop"}),
    ({"dp": 2, "pp": 2}, {"activations": "drop", "zero": 3, "schedule": "gpipe"}),
    ({"pp": 2}, {**INTERLEAVED, "size": 4, "activations": "drop"}),
    ({"pp": 2}, {**INTERLEAVED, "size": 4}),
    ({"pp": 2}, {**INTERLEAVED, "size": 4, "zero": 3}),
    ({"dp": 2, "pp": 2}, {**INTERLEAVED, "size": 8, "zero": 2}),
]


def fits(kind: str, layout: dict[str, int], options: dict[str, Any]) -> bool:
    if "cp" in layout or SP.items() <= options.items():
        return kind in ("gpt", "untied")
    if kind == "mlp":
        return "stages" not in options
    if kind == "own":
        return "chunks" not in options
    return kind == "gpt" or "tp" not in layout


# Every way with GPT and with another model, on threads; with one model each on processes.
TOGETHER = [*(("gpt", *way) for way in WAYS), *in_turn(WAYS, fits, ["untied", "mlp", "own"])]
WITH_MPI = in_turn(WAYS, fits, MODELS)


def _go(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    given = dict(options)
    same(kind, {"dp": 1, **layout}, given, given.pop("size", 5))


@cases(("kind", "layout", "options"), TOGETHER, ids=name_of)
def test_training_is_that_of_one_process(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    """Losses, norms, validation, parameters, gradients and outputs, on ranks that are threads."""
    on_threads(lambda: _go(kind, layout, options), ranks=ranks_of(layout))


@pytest.mark.mpi
@cases(("kind", "layout", "options"), WITH_MPI, ids=name_of)
def test_training_with_mpi(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    """Likewise on the processes of mpiexec, on as many ranks as there are."""
    if ranks_of(layout) == Mesh().size > 1:
        _go(kind, layout, options)


@cases("microbatches", [1, 2, 3, 7])
@cases("schedule", ["naive", "gpipe", "1f1b", "zero-bubble"])
def test_fewer_and_more_microbatches_than_stages(schedule: str, microbatches: int) -> None:
    on_threads(
        lambda: same("gpt", {"dp": 1, "pp": 3}, {"schedule": schedule}, microbatches), ranks=3
    )


class Detached(nn.Module):
    """Its first part gets no gradient, though it might be trained."""

    chain = ("first", "last")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.first.register_forward_hook(lambda module, inputs, output: output.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@cases("zero", [0, 2])
@cases("schedule", ["1f1b", "zero-bubble"])
def test_a_stage_that_gets_no_gradient(schedule: str, zero: int) -> None:
    """Zero-bubble expected gradients of weights that are to be computed: an AssertionError."""

    def program(mesh: Mesh, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
        step = hpcml.parallelize(
            Detached().double(), loss=nn.MSELoss(), optimizer=hpcml.optim.AdamW,
            lr=1e-2, seed=3, microbatch=1, mesh=mesh, **options,
        )  # fmt: skip
        for number in range(STEPS):
            step(tuple(np.random.default_rng(number).standard_normal((2, 4, 6))))
        return values(step)

    expected = program(serial_mesh())
    options = {"schedule": schedule, "zero": zero}
    for found in on_threads(lambda: program(Mesh(dp=2, pp=2), **options), ranks=4):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


# --- bits ---------------------------------------------------------------------------------------

BITS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 2}, {"zero": 2}),
    ({"pp": 2}, {}),
    ({"pp": 2}, {"schedule": "gpipe"}),
    ({"pp": 2}, {"schedule": "zero-bubble"}),
    ({"pp": 2}, {"schedule": "naive", "stages": [3]}),
    ({"pp": 2}, {**INTERLEAVED}),
    ({"pp": 2}, {"activations": "drop"}),
    ({"pp": 2}, {"activations": "offload", "schedule": "gpipe"}),
    ({"pp": 3}, {"zero": 1}),
    ({"pp": 4}, {"schedule": "zero-bubble"}),
    *(({"dp": 2, "pp": 2}, {"zero": stage}) for stage in range(4)),
    ({"dp": 2, "pp": 2}, {"zero": 2, "shard_ranks": 1}),
]


def bits(kind: str, mesh: Mesh, size: int = 4, **options: Any) -> tuple[str, list[float]]:
    """Of all parameters after some steps, and the losses and norms."""
    step = make(kind, mesh, "float32", **options)
    numbers = []
    for number in range(STEPS):
        numbers += [step(MODELS[kind][2](number, size)), step.grad_norm]
    digest = hashlib.sha256()
    for name, array in step.gathered():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest(), numbers


@cache
def serial_bits(kind: str) -> tuple[str, list[float]]:
    return bits(kind, Mesh(Alone(), deterministic=True))


@cases(("layout", "options"), BITS, ids=name_of)
@cases("kind", ["gpt", "untied", "own"])
def test_deterministic_mode_has_the_same_bits(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    """Whatever the stages, schedule, data-parallel ranks and stage of ZeRO; tied weights too."""
    if kind == "own" and ("stages" in options or "chunks" in options):
        pytest.skip("cuts for another model")

    def program() -> tuple[str, list[float]]:
        return bits(kind, Mesh(deterministic=True, **{"dp": 1, **layout}), **options)

    for found in on_threads(program, ranks=ranks_of(layout)):
        assert found == serial_bits(kind)


@cases("zero", [0, 3])
def test_gradients_that_come_before_their_turn(zero: int) -> None:
    """Overlapped products give those of weights with those of activations, which are first here.

    They were added to those of the microbatch before, which then had other bits on 2 dp ranks.
    """

    def program(pp: int, dp: int, **options: Any) -> str:
        mesh = Mesh(deterministic=True, pp=pp, dp=dp, tp=2)
        return bits("untied", mesh, 12, **options, **SP, overlap=True)[0]

    expected = on_threads(lambda: program(1, 1), ranks=2)[0]
    options = {"zero": zero, "schedule": "zero-bubble"}
    assert set(on_threads(lambda: program(2, 2, **options), ranks=8)) == {expected}


@cases("kind", ["gpt", "untied", "own"])
def test_deterministic_mode_is_the_same_training(kind: str) -> None:
    """But for rounding, where links that share a parameter each have a sum of their own."""
    _, numbers = bits(kind, serial_mesh())
    np.testing.assert_allclose(serial_bits(kind)[1], numbers, rtol=1e-4)


# --- values, results ----------------------------------------------------------------------------


@cases("kind", MODELS)
def test_first_values_are_those_of_one_rank(kind: str) -> None:
    """To the bit; no rank makes those of other stages, and values can be loaded."""
    expected = values(make(kind, serial_mesh()))

    def program() -> None:
        step = make(kind, Mesh(dp=1, pp=2))
        found = values(step)
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name
        here = sum(p._array is not None for p in step.model.parameters())
        everywhere = len(list(step.model.parameters()))
        assert 0 < here < everywhere
        again = make(kind, Mesh(dp=1, pp=2), seed=4)
        again.model.load_state_dict(expected, strict=False)
        for name, array in values(again).items():
            assert array.tobytes() == expected[name].tobytes(), name
        after = [step(MODELS[kind][2](0)), again(MODELS[kind][2](0))]
        assert len(set(after)) == 1 or kind in ("gpt", "untied", "own")  # dropout of other seeds

    on_threads(program, ranks=2)


@cases("layout", [{"dp": 2}, {"dp": 1, "pp": 2}], ids=name_of)
def test_exact_values_beside_frozen_ones(layout: dict[str, int]) -> None:
    """What is gathered of 16-bit parameters is their master in float32, whatever comes before."""
    half = hpcml.backend.dtype("bfloat16")

    def program() -> None:
        model = GPT(VOCAB, LENGTH, 3, 2, 8, tie_embeddings=False).to(half)
        model.transformer.wte.requires_grad_(False)
        step = hpcml.parallelize(
            model, loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, mesh=Mesh(**layout), zero=3
        )
        step(tokens(0))
        found = values(step)
        weight = found["transformer.h.0.mlp.c_fc.weight"]
        assert found["transformer.wte.weight"].dtype == half and weight.dtype == np.float32
        assert (weight.view(np.uint32) % (1 << 16)).any()

    on_threads(program, ranks=2)


def test_values_that_were_given_are_those_of_the_first_rank() -> None:
    def program(mesh: Mesh) -> dict[str, np.ndarray]:
        model = GPT(VOCAB, LENGTH, 3, 2, 8).to(np.float64).name_parts()
        for number, parameter in enumerate(model.parameters()):
            parameter.data[...] = number + mesh.rank
        return values(
            hpcml.parallelize(model, loss=NextTokenLoss(), optimizer=hpcml.optim.SGD, mesh=mesh)
        )

    expected = program(serial_mesh())
    for layout in ({"dp": 1, "pp": 3}, {"dp": 2, "pp": 2}):
        for found in on_threads(lambda: program(Mesh(**layout)), ranks=ranks_of(layout)):  # noqa: B023
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    """A file in which stages go there and back: rank 0 has the first and the last one."""
    file = tmp_path / "there and back.txt"
    forward = "0F{0} 3F{0} 3B{0} 0B{0}"
    rows = [" ".join(forward.format(m) for m in range(5)),
            " ".join(f"1F{m} 2F{m} 2B{m} 1B{m}" for m in range(5))]  # fmt: skip
    file.write_text("name: mine\n" + "\n".join(rows) + "\n")
    on_threads(lambda: same("gpt", {"dp": 1, "pp": 2}, {"schedule": str(file)}), ranks=2)


def test_gradients_of_batches_that_are_added_up() -> None:
    def program(mesh: Mesh) -> tuple[float, dict[str, np.ndarray]]:
        step = make("gpt", mesh)
        with step.no_sync():
            step(tokens(0, 3))
        loss = step(tokens(1, 4))
        return loss, values(step)

    loss, expected = program(serial_mesh())
    for found, mine in on_threads(lambda: program(Mesh(dp=1, pp=3)), ranks=3):
        assert found == pytest.approx(loss, rel=1e-12)
        for name, array in expected.items():
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-12, err_msg=name)
