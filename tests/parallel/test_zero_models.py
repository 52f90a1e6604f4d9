"""Models that are not chains of layers, in every form of ZeRO: how units come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Context, Tensor, enable_grad, no_grad, primitive
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.optim import AdamW
from hpcml.parallel.units import divide
from tests.parallel.cases import KINDS, WAYS, decay_matrices, make, serial_mesh, values

cases = pytest.mark.parametrize


class Odd(nn.Module):
    """Parameters of the root, one used outside its module, a branch that data decide on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(np.ones(6, np.float32))
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.frozen(self.a(x * self.scale)).tanh())
        if self.uses_rare(x):
            out = out + self.rare(x)
        return (out @ self.a.weight).sum(1, keepdim=True)

    def uses_rare(self, x: Tensor) -> bool:
        return True


class SomeTimes(Odd):
    """Ranks do not all use the same layers: a microbatch decides."""

    def uses_rare(self, x: Tensor) -> bool:
        return bool(x.numpy()[0, 0] > 0)


class Branches(nn.Module):
    """Each sample takes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.a if x.numpy()[0, 0] > 0 else self.b
        return self.last(chosen(self.first(x)).tanh())


class Single(nn.Module):
    """One unit: what backward used last is what the next forward begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(np.linspace(-1, 1, 6, dtype=np.float32).reshape(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()


class Bypassed(nn.Module):
    """Enters its blocks by `forward`: no hook runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.forward(x).tanh()
        return self.last.forward(x)


@primitive
def times_transposed(ctx: Context, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Saves a view of an input."""
    turned = weight.T
    ctx.save(x, turned)
    return x @ turned


@times_transposed.adjoint
def _(ctx: Context, g: np.ndarray) -> np.ndarray:
    return g @ ctx.saved[1].T


@times_transposed.adjoint
def _(ctx: Context, g: np.ndarray) -> np.ndarray:
    return g.T @ ctx.saved[0]


class Table(nn.Module):
    """Gives a view of its parameter away, which is used when the module is done."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(np.linspace(-1, 1, 54, dtype=np.float32).reshape(9, 6))

    def forward(self, which: int) -> Tensor:
        return self.weight[which]


class Views(nn.Module):
    """Computes with views of parameters, while other units are gathered where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.tables = nn.ModuleList(Table() for _ in range(2))
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = [table(number + 2) for number, table in enumerate(self.tables)]
        for layer in self.layers:
            x = (x @ layer.weight.transpose(1, 0)).tanh()
            x = times_transposed(x, layer.weight) + layer.bias.detach()
        return self.last(x * rows[0] + rows[1])


@cases("way", ["3", "3 small buckets", "3 overlap", "3 layers"])
@cases("microbatch", [1, 3])
def test_views_of_parameters(mesh: Mesh, way: str, microbatch: int) -> None:
    """Others were gathered into the memory behind them before they were used."""
    found = trained(Views, mesh, microbatch=microbatch, **WAYS[way])
    for name, array in trained(Views, serial_mesh(), microbatch=microbatch).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("deterministic", [False, True])
@cases("way", ["0", "0 overlap", "1", "1 overlap", "2", "2 overlap"])
def test_ranks_that_use_different_layers(mesh: Mesh, way: str, deterministic: bool) -> None:
    where = Mesh(deterministic=True) if deterministic and mesh.size > 1 else mesh
    found = trained(Branches, where, microbatch=1, **WAYS.get(way, {}))
    for name, array in trained(Branches, serial_mesh(), microbatch=1).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("way", ["3", "3 overlap", "3 layers"])
@cases("kind", [Single, Bypassed])
def test_a_unit_used_last_is_fetched_anew_after_the_update(
    mesh: Mesh, kind: Callable[[], nn.Module], way: str
) -> None:
    """Its old values were still in memory, and were taken for those of the next step."""
    found = trained(kind, mesh, microbatch=2, **WAYS[way])
    for name, array in trained(kind, serial_mesh(), microbatch=2).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


def test_a_unit_used_last_is_fetched_anew_after_loading(mesh: Mesh) -> None:
    step = hpcml.parallelize(
        Single(), loss=nn.MSELoss(), optimizer=AdamW, mesh=mesh, zero=3, seed=1
    )
    x, y = np.ones((2, 6), np.float32), np.zeros((2, 1), np.float32)
    assert step.evaluate([(x, y)]) == pytest.approx(0, abs=1e-6)
    step.model.load_state_dict({"weight": np.full((6, 1), 10, np.float32)})
    assert step.evaluate([(x, y)]) == pytest.approx(1, abs=1e-6)


def test_gathered_values_are_not_written_to(mesh: Mesh) -> None:
    """It would go nowhere."""
    step = make("mlp", mesh, zero=3)
    with pytest.raises(ValueError, match="read-only"):
        step.model.layers[0].weight.data[...] = 0


@cases("way", [*WAYS, "0"])
@cases("microbatch", [1, 2])
def test_odd_models(mesh: Mesh, way: str, microbatch: int) -> None:
    options = WAYS.get(way, {})
    # To gather parameters ranks must use the same layers.
    kind = SomeTimes if options.get("zero", 0) < 3 else Odd
    found, expected = (
        trained(kind, where, microbatch=microbatch, **more)
        for where, more in ((mesh, options), (serial_mesh(), {}))
    )
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)


def trained(kind: Callable[[], nn.Module], mesh: Mesh, **options: Any) -> dict[str, np.ndarray]:
    model = kind().double()
    step = hpcml.parallelize(
        model, loss=nn.MSELoss(), optimizer=AdamW, lr=1e-2, mesh=mesh, seed=1, grad_clip=0.5,
        groups=decay_matrices, **options,
    )  # fmt: skip
    random = np.random.default_rng(4)
    for _ in range(3):
        step((random.normal(size=(7, 6)), random.normal(size=(7, 1))))
    return values(step)


def test_frozen_parameters_are_sharded_too(mesh: Mesh) -> None:
    step = make("own", mesh, zero=3)
    storage = step.optimizer.storage
    frozen = [bucket for bucket in storage.buckets if not bucket.trained]
    assert frozen and all(bucket.data.size * mesh.size == bucket.size for bucket in frozen)
    assert all(p._array is None for p in step.model.parameters())
    before = values(step)
    step(KINDS["own"].batch(6, 0))
    np.testing.assert_array_equal(values(step)["frozen.weight"], before["frozen.weight"])


def test_units_by_default_and_declared() -> None:
    def names(model: nn.Module) -> list[list[str]]:
        model.name_parts()
        return [[p.name for p in unit] for unit in divide(model, list(model.parameters()))]

    gpt = KINDS["gpt"].model()
    found = names(gpt)
    blocks = [unit for unit in found if unit[0].startswith("transformer.h")]
    assert [unit[0] for unit in blocks] == ["transformer.h.0.ln_1.weight",
                                            "transformer.h.1.ln_1.weight"]  # fmt: skip
    assert found[0] == ["transformer.wte.weight", "transformer.wpe.weight"], "small: joined"
    assert found[-1] == ["transformer.ln_f.weight", "transformer.ln_f.bias"], "beside a tied head"
    gpt.units = ("transformer.h.*.mlp", "transformer.h.*.attn")  # type: ignore[assignment]
    declared = names(gpt)
    assert sum("mlp" in unit[0] for unit in declared) == 2
    assert sorted(n for unit in declared for n in unit) == sorted(n for u in found for n in u)
    gpt.units = ("transformer.layers.*",)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r'GPT.units: no module is called "transformer.layers'):
        names(gpt)


class Tied(nn.Module):
    """A small vocabulary at both ends of layers, of which the last is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(6, 4)
        self.position = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, size, bias=False) for size in (8, 4, 64))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.source.weight


def test_what_a_large_head_follows_is_apart_from_the_layer_before() -> None:
    """A part of the last block came beside the head, for the norm after it."""
    model = nn.Sequential(
        nn.Linear(4, 16, bias=False), nn.Linear(4, 16, bias=False), nn.LayerNorm(4),
        nn.Linear(4, 64, bias=False),
    )  # fmt: skip
    model.name_parts()
    found = [[p.name for p in unit] for unit in divide(model, list(model.parameters()))]
    assert found == [["0.weight", "1.weight"], ["2.weight", "2.bias"], ["3.weight"]]


class Embeddings(nn.Module):
    """As BERT has them, in one module, with a small vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(6, 4), nn.Embedding(20, 4)
        self.ln = nn.LayerNorm(4)


def test_what_is_used_at_several_ends_is_apart_from_the_rest_of_its_module() -> None:
    """The norm was remade for the first layer, while the word had been there since the head."""
    model = nn.Sequential(Embeddings(), nn.Linear(4, 64, bias=False), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].word.weight  # type: ignore[index]
    model.name_parts()
    found = [[p.name for p in unit] for unit in divide(model, list(model.parameters()))]
    assert found == [
        ["0.word.weight"],
        ["0.position.weight", "0.ln.weight", "0.ln.bias"],
        ["1.weight"],
    ]


def test_little_is_joined_to_what_is_used_at_several_ends() -> None:
    """The first layer was: in backward all of it was there from the head to that layer."""
    model = Tied()
    model.name_parts()
    found = [[p.name for p in unit] for unit in divide(model, list(model.parameters()))]
    assert found == [
        ["source.weight", "position.weight"],
        ["layers.0.weight", "layers.1.weight"],
        ["layers.2.weight"],
    ]


@primitive
def again(ctx: Context, x: Any, function: Any = None) -> Any:
    """What a function makes of x, computed again in backward instead of kept."""
    ctx.attributes = function
    ctx.save(x)
    with no_grad():
        return function(Tensor(x)).data


@again.adjoint
def _(ctx: Context, g: Any) -> Any:
    (x,) = ctx.saved
    with enable_grad():
        inner = Tensor(x, requires_grad=True)
        out = ctx.attributes(inner)
    out.backward(g)
    return inner.gradient


class Forgetting(nn.Module):
    """Blocks that are computed again in backward, from a step on; their biases are used beside."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))
        self.scales = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.since, self.number = since, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            if self.number >= self.since:
                x = scale(again(x, function=lambda y, block=block: block(y).tanh() + y))
            else:
                x = scale(block(x).tanh() + x)
        self.number += 1
        return self.last(x)


def forgetting(mesh: Mesh, since: int, **options: Any) -> dict[str, Any]:
    """Losses and all gradients of some steps."""
    hpcml.manual_seed(3)
    step = hpcml.parallelize(
        Forgetting(since).double(), loss=nn.MSELoss(), optimizer=AdamW, mesh=mesh, **options
    )
    found = dict[str, Any]()
    for number in range(5):
        x, y = np.random.default_rng(number).standard_normal((2, 12, 6))
        found[f"loss {number}"] = step((x, y))
        for name, gradient in step.gathered_gradients():
            found[f"{name} {number}"] = gradient.copy()
    return found


@cases(("overlap", "since", "bucket_mb"), [(False, 0, 25), (True, 0, 25), (True, 5, 1e-4)])
@cases("stage", [0, 1, 2, 3])
def test_backward_within_backward(
    mesh: Mesh, stage: int, overlap: bool, since: int, bucket_mb: float
) -> None:
    """The record does not tell of the gradients that it brings: they were left out of the sums.

    From the first microbatch on, or a later one.
    """
    expected = forgetting(serial_mesh(), since)
    found = forgetting(mesh, since, zero=stage, overlap=overlap, bucket_mb=bucket_mb, microbatch=2)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        atol = 1e-12 * np.abs(array).max()
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


class Twice(nn.Module):
    """A layer that is used as it is, and by what is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(again(self.first(x), function=lambda y: self.layer(y).tanh()))


@cases("stage", [2, 3])
def test_backward_within_backward_to_what_is_used_beside(mesh: Mesh, stage: int) -> None:
    """It is reduced when one of both has come."""
    step = hpcml.parallelize(Twice(), loss=nn.MSELoss(), optimizer=AdamW, mesh=mesh, zero=stage)
    x = np.ones((12, 6), np.float32)
    with pytest.raises(
        RuntimeError, match=r"layer\.\w+: a gradient came after it had been reduced"
    ):
        step((x, x))


class Link(nn.Module):
    """A layer that is used by two that compute it again, and one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = again(x, function=lambda y: self.layer(y).tanh())
        return x


class Links(nn.Module):
    """Two of them, to be cut apart."""

    chain = ("links.*",)

    def __init__(self) -> None:
        super().__init__()
        self.links = nn.ModuleList(Link() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for link in self.links:
            x = link(x)
        return x


@cases("stage", [0, 2])
def test_backward_within_backward_before_its_turn(stage: int) -> None:
    """Zero-bubble takes one gradient of a parameter in each microbatch; the second was left out."""

    def program() -> None:
        step = hpcml.parallelize(
            Links(), loss=nn.MSELoss(), optimizer=AdamW, zero=stage, microbatch=2,
            schedule="zero-bubble", mesh=Mesh(pp=2, deterministic=True),
        )  # fmt: skip
        x = np.ones((4, 6), np.float32)
        step((x, x))

    with pytest.raises(
        RuntimeError, match=r"layer\.\w+: a gradient came after it had been reduced"
    ):
        hpcml.run(program, ranks=2)


class Ended(nn.Module):
    """One layer at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ends(x).tanh()
        for block in self.blocks:
            x = block(x).tanh() + x
        return self.ends(x)


@cases("since", [0, 2])
@cases("stage", [0, 1, 2, 3])
def test_what_the_optimizer_does_not_have_may_get_gradients(
    mesh: Mesh, stage: int, since: int
) -> None:
    """Frozen at first: a KeyError at stage 3, where frozen parameters are divided too."""

    def run(mesh: Mesh, **options: Any) -> dict[str, Any]:
        hpcml.manual_seed(3)
        model = Ended().double()
        model.ends.requires_grad_(False)
        step = hpcml.parallelize(
            model, loss=nn.MSELoss(), optimizer=AdamW, mesh=mesh, bucket_mb=1e-4, **options
        )
        for number in range(4):
            if number == since:
                model.ends.requires_grad_(True)
            step(tuple(np.random.default_rng(number).standard_normal((2, 12, 6))))
        return values(step)

    expected, found = run(serial_mesh()), run(mesh, zero=stage, overlap=True)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)
