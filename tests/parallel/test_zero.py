"""ZeRO in every stage and form against one process, and what is special about sharded models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Context, Tensor, primitive
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.optim import SGD, AdamW
from hpcml.parallel import Step, groups
from hpcml.parallel.units import divide
from hpcml.parallel.zero import Zero
from tests.parallel.cases import (
    KINDS,
    OPTIMIZERS,
    compare,
    decay_matrices,
    make,
    reference,
    run,
    serial_mesh,
    values,
)

cases = pytest.mark.parametrize
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
    "1 layers": {"zero": 1, "zero_split": "layers"},
    "2 layers": {"zero": 2, "zero_split": "layers"},
    "3 layers": {"zero": 3, "zero_split": "layers"},
    "3 layers overlap": {"zero": 3, "zero_split": "layers", "overlap": True},
}
RUNS = [  # kind, optimizer, size, microbatch
    ("gpt", "adamw", 8, 0), ("gpt", "adamw", 1, 1), ("gpt", "adamw", 5, 2), ("own", "adamw", 8, 3),
    ("mlp", "sgd", 8, 3),
]  # fmt: skip


# Each stage with every run; each other way with shares that differ, and with another run in turn.
TOGETHER = [
    *((stage, *one) for stage in "123" for one in RUNS),
    *((way, *RUNS[2]) for way in list(WAYS)[3:]),
    *((way, *[*RUNS[:2], *RUNS[3:]][turn % 4]) for turn, way in enumerate(list(WAYS)[3:])),
]


@cases(("way", "kind", "optimizer", "size", "microbatch"), TOGETHER)
@pytest.mark.mpi
def test_parameters_in_float64(
    way: str, kind: str, optimizer: str, size: int, microbatch: int
) -> None:
    expected = reference(kind, "float64", optimizer, size, 5)
    found = run(kind, Mesh(), "float64", optimizer, size, microbatch, 5, **WAYS[way])
    compare(found, expected)


@cases("stage", [1, 2, 3])
@cases("kind", KINDS)
def test_one_process_alone(kind: str, stage: int) -> None:
    expected = reference(kind, "float64", "sgd", 8, 5)
    compare(run(kind, serial_mesh(), "float64", "sgd", 8, 3, 5, zero=stage), expected)


@cases("stage", [0, 1, 2, 3])
@pytest.mark.mpi
def test_losses_and_gradients_in_float32(stage: int) -> None:
    expected = reference("gpt", "float32", "adamw", 7, 20)
    mesh = Mesh()
    found = run("gpt", mesh, "float32", "adamw", 7, 3, 20, zero=stage)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    first, alone = (
        gradients(make("gpt", where, "float32", lr=0.0, zero=zero))
        for where, zero in ((mesh, stage), (serial_mesh(), 0))
    )
    for name, array in alone.items():
        np.testing.assert_allclose(
            first[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name
        )


def gradients(step: Step) -> dict[str, np.ndarray]:
    """Of the first step, from what SGD's momentum holds then: the gradient and the decay."""
    step(KINDS["gpt"].batch(7, 0))
    storage, state = step.optimizer.storage, step.optimizer.state["momentum_buffer"]
    parts = [np.zeros(bucket.size, np.float32) for bucket in storage.trained]
    start = 0
    for bucket, part in zip(storage.trained, parts, strict=True):
        mine = storage.sharding.owned("optim", bucket)
        length = mine.stop - mine.start
        part[mine] = state[start : start + length]
        start += length
        if storage.sharding.stage:
            step.groups.shard.allreduce(part, out=part)
    return {
        p.name: bucket.view(part, number)
        for bucket, part in zip(storage.trained, parts, strict=True)
        for number, p in enumerate(bucket.parameters)
    }


# --- groups of ranks ----------------------------------------------------------------------------


@cases(("stage", "split", "overlap"), [
    (1, "blocks", True), (2, "blocks", False), (3, "blocks", True),
    (1, "layers", False), (2, "layers", True), (3, "layers", False),
])  # fmt: skip
@cases("shards", [1, 2])
@pytest.mark.mpi(min_size=2)
def test_shards_within_groups(shards: int, stage: int, split: str, overlap: bool) -> None:
    mesh = Mesh()
    if mesh.size % shards:
        with pytest.raises(UserError, match=f"shard_ranks={shards} must divide the {mesh.size}"):
            make("gpt", mesh, zero=stage, shard_ranks=shards)
        return
    found = run(
        "gpt", mesh, "float64", "adamw", 8, 3, 5,
        zero=stage, shard_ranks=shards, zero_split=split, overlap=overlap,
    )  # fmt: skip
    compare(found, reference("gpt", "float64", "adamw", 8, 5))


@pytest.mark.mpi(min_size=2)
@cases("stage", [0, 1, 2, 3])
def test_replicas_are_checked_in_every_stage(stage: int) -> None:
    """All ranks hear of it, and of the parameter."""
    mesh = Mesh()
    step = make("gpt", mesh, zero=stage, shard_ranks=1 if stage else 0)
    step(KINDS["gpt"].batch(4, 0))
    step.check_replicas()
    bucket = step.optimizer.storage.buckets[-1]
    last = bucket.parameters[-1].name
    if mesh.rank == mesh.size - 1:
        bucket.data[bucket.slices[-1].stop - 1] += 1
    with pytest.raises(RuntimeError, match=f"drifted apart: parameter {last} differs"):
        step.check_replicas()


# --- accumulation by hand -----------------------------------------------------------------------


@cases("deterministic", [False, True])
@cases("overlap", [False, True])
@cases("stage", [0, 1])
def test_no_sync_makes_one_large_batch(
    mesh: Mesh, stage: int, overlap: bool, deterministic: bool
) -> None:
    if deterministic:
        mesh = Mesh(deterministic=True) if mesh.size > 1 else mesh
    x, y = KINDS["mlp"].batch(12, 0)
    whole = make("mlp", serial_mesh())
    whole((x, y))
    step = make("mlp", mesh, zero=stage, overlap=overlap)
    before = mesh.ledger.snapshot()
    with step.no_sync():
        first = step((x[:5], y[:5]))
        step((x[5:6], y[5:6]))
        sent = (mesh.ledger.snapshot() - before).get("dp", {})
        assert deterministic or all(count.bytes < 1000 for count in sent.values())
    last = step((x[6:], y[6:]))
    assert first != last
    assert step.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    for name, array in values(whole).items():
        np.testing.assert_allclose(values(step)[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("stage", [0, 1])
def test_an_error_ends_an_accumulation(mesh: Mesh, stage: int) -> None:
    """Half a batch must not count: the next step begins anew."""
    batch = KINDS["mlp"].batch(6, 0)
    step, expected = make("mlp", mesh, zero=stage, microbatch=1), make("mlp", serial_mesh())

    def fail(*_: Any) -> None:
        raise RuntimeError("by the way")

    with step.no_sync():
        step(batch)
        handle = step.model.layers[0].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(RuntimeError, match="by the way"):
            step(batch)
    handle.remove()
    step(batch)
    expected(batch)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)


@cases("stage", [2, 3])
def test_no_sync_is_refused_where_it_saves_nothing(stage: int) -> None:
    step = make("mlp", serial_mesh(), zero=stage)
    with (
        pytest.raises(UserError, match=rf"no_sync\(\) with zero={stage}.*microbatch"),
        step.no_sync(),
    ):
        pass


@pytest.mark.mpi(min_size=2)
def test_what_accumulation_moves() -> None:
    """With A microbatches stage 2 moves A + 1 and stage 3 moves 3 A times the parameters."""
    for stage, expected in ((0, 2), (1, 2), (2, 4 + 1), (3, 3 * 4)):
        mesh = Mesh()
        step = make("gpt", mesh, "float32", zero=stage, microbatch=2, model=plain_gpt())
        count = sum(p.numel() for p in step.model.parameters())
        batch = KINDS["gpt"].batch(2 * 4 * mesh.size, 0)
        step(batch)
        before = mesh.ledger.snapshot()
        step(batch)
        moved = (mesh.ledger.snapshot() - before)["dp"]
        elements = sum(
            c.bytes / 4 * (2 if name == "all_reduce" else 1) for name, c in moved.items()
        )
        # The unit with which forward ends stays for backward; norms and losses are all-reduced.
        assert elements / count == pytest.approx(expected, rel=0.05), stage


def plain_gpt() -> nn.Module:
    return hpcml.models.GPT(11, 5, layers=6, heads=2, width=64)


# --- models that are not chains of layers -------------------------------------------------------


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


# --- what a sharded model is like ---------------------------------------------------------------


def test_state_dict_of_a_sharded_model(mesh: Mesh) -> None:
    """Copies: what is gathered is gone when the next unit is."""
    step = make("gpt", mesh, zero=3)
    state = step.model.state_dict()
    for name, array in values(step).items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


@cases("dtype", ["float32", "bfloat16"])
@cases("stage", [0, 1, 2, 3])
def test_a_state_that_is_loaded_reaches_what_ranks_hold(mesh: Mesh, stage: int, dtype: str) -> None:
    """Masters and shards too: the next update starts from it."""
    given = {
        name: np.random.default_rng(5).normal(size=p.shape).astype(np.float32)
        for name, p in KINDS["mlp"].model().named_parameters()
    }
    step = make("mlp", mesh, hpcml.backend.dtype(dtype), zero=stage, lr=0.0)
    batch = KINDS["mlp"].batch(6, 0)
    step(batch)
    step.model.load_state_dict(given)
    step(batch)
    for name, array in step.gathered():
        np.testing.assert_array_equal(array, given[name], err_msg=name)
    loss = make("mlp", serial_mesh(), hpcml.backend.dtype(dtype), lr=0.0)
    loss.model.load_state_dict(given)
    assert step(batch) == pytest.approx(loss(batch), rel=1e-2 if dtype == "bfloat16" else 1e-6)


@cases("stages", [(3, 0), (3, 3), (0, 3), (2, 1)])
def test_training_goes_on_in_another_layout(mesh: Mesh, stages: tuple[int, int]) -> None:
    """What was learned is not lost when a sharded model is laid out anew."""
    first = make("mlp", mesh, zero=stages[0])
    first(KINDS["mlp"].batch(6, 0))
    learned = values(first)
    again = make("mlp", mesh, zero=stages[1], model=first.model)
    for name, array in values(again).items():
        np.testing.assert_array_equal(array, learned[name], err_msg=name)
    again(KINDS["mlp"].batch(6, 1))
    assert any((array != learned[name]).any() for name, array in values(again).items())


def test_evaluation_in_every_stage(mesh: Mesh) -> None:
    batches = [KINDS["gpt"].batch(size, size) for size in (7, 1)]
    expected = make("gpt", serial_mesh()).evaluate(batches)
    for stage in range(4):
        step = make("gpt", mesh, zero=stage, microbatch=2, overlap=stage == 3)
        assert step.evaluate(batches) == pytest.approx(expected, rel=1e-12)
        step(batches[0])
        assert step.evaluate(batches) < expected


@cases("stage", [0, 1, 2, 3])
def test_training_goes_on_after_an_error(mesh: Mesh, stage: int) -> None:
    """In the middle of a backward: nothing of it is left over."""
    step, expected = (
        make("own", where, zero=zero, microbatch=1)
        for where, zero in ((mesh, stage), (serial_mesh(), 0))
    )
    batch = KINDS["own"].batch(6, 0)

    def fail(*_: Any) -> None:
        raise RuntimeError("by the way")

    handle = step.model.first.weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RuntimeError, match="by the way"):
        step(batch)
    handle.remove()
    step.samples = 0
    step(batch)
    expected(batch)
    for name, array in values(expected).items():
        np.testing.assert_allclose(values(step)[name], array, rtol=0, atol=1e-12, err_msg=name)


@cases("stage", [0, 1, 2, 3])
def test_the_place_where_numbers_stop_being_finite(mesh: Mesh, stage: int) -> None:
    batch = KINDS["own"].batch(5, 0)
    step = make("own", mesh, zero=stage)
    handle = step.model.shared.register_forward_hook(lambda m, i, out: out * np.inf)
    with pytest.raises(NonFiniteError, match=r"output of shared \(Linear\) is not finite"):
        step(batch)
    handle.remove()
    weight = step.optimizer.storage.home[id(step.model.head.weight)]
    weight.data[...] = np.nan
    with pytest.raises(NonFiniteError, match=r"parameter \S+ is not finite"):
        step(batch)


@cases("deterministic", [False, True])
@cases("overlap", [False, True])
@cases("stage", [0, 1, 2, 3])
def test_in_a_loop_of_ones_own(mesh: Mesh, stage: int, overlap: bool, deterministic: bool) -> None:
    """The states by themselves, without `parallelize`, with two microbatches a rank."""
    expected = make("mlp", serial_mesh(), microbatch=2)
    model = KINDS["mlp"].model().double().name_parts()
    hpcml.manual_seed(3)
    where = Mesh(deterministic=deterministic) if mesh.size > 1 else mesh
    optimizer = SGD(model.parameters(), **OPTIMIZERS["sgd"][1])
    states = Zero(
        model, optimizer, groups.divide(where, stage), overlap=overlap, deterministic=deterministic
    )
    axis = where["dp"]
    for number in range(3):
        x, y = KINDS["mlp"].batch(4 * axis.size, number)
        expected((x, y))
        states.begin(2)
        for k in range(2):
            states.before_backward(last=k == 1)
            first = 2 * (k * axis.size + axis.rank)
            mine = slice(first, first + 2)
            loss = KINDS["mlp"].loss(model(Tensor(x[mine])), Tensor(y[mine]))
            loss.backward(np.array(0.5 / axis.size))
            states.after_backward()
        states.finish()
        assert states.norm() == pytest.approx(expected.grad_norm, rel=1e-12)
        states.update()
    for name, array in states.gathered():
        np.testing.assert_allclose(array, values(expected)[name], rtol=0, atol=1e-12, err_msg=name)


# --- 16 bits ------------------------------------------------------------------------------------


@cases("dtype", ["bfloat16", "float16"])
@cases("stage", [0, 1, 2, 3])
def test_sixteen_bits_in_every_stage(mesh: Mesh, stage: int, dtype: str) -> None:
    """Near the run in float32, and masters are float32."""
    kind = hpcml.backend.dtype(dtype)
    step = make("gpt", mesh, dtype=kind, zero=stage, microbatch=2)
    exact = make("gpt", serial_mesh(), dtype="float32")
    for number in range(4):
        batch = KINDS["gpt"].batch(8, number)
        assert step(batch) == pytest.approx(exact(batch), rel=0.02)
    assert np.isfinite(step.grad_norm)
    start, expected = values(make("gpt", serial_mesh(), dtype="float32")), values(exact)
    for name, array in values(step).items():
        assert array.dtype == np.float32
        moved = np.linalg.norm(expected[name] - start[name])
        assert np.linalg.norm(array - expected[name]) <= 0.25 * moved, name
    assert step.optimizer.storage.data.dtype == kind == step.optimizer.storage.grad.dtype


@cases("stage", [0, 1, 2, 3])
def test_an_overflow_is_skipped_by_all_ranks_alike(mesh: Mesh, stage: int) -> None:
    step = make("mlp", mesh, dtype="float16", zero=stage)
    assert step.scaler is not None
    step.scaler.scale = 2.0**40
    batch, before, scales = KINDS["mlp"].batch(8, 0), values(step), []
    while not np.isfinite(step.grad_norm):
        step(batch)
        scales.append(step.scaler.scale)
    assert len(scales) > 3 and step.optimizer.steps == 1, "skipped until it fits"
    assert scales[1] == scales[0] / 2 and scales[-1] == scales[-2]
    every = mesh["dp"].allgather_object((scales, step.grad_norm))
    assert all(one == every[0] for one in every)
    assert any((before[name] != array).any() for name, array in values(step).items())
    step.check_replicas()
