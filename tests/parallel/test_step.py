"""One step: communication, batches of every form, numbers of samples, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import backend, nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.data import Batches
from hpcml.errors import NonFiniteError, UserError
from hpcml.optim import SGD
from hpcml.parallel import Step
from hpcml.parallel.data import count, microbatches
from tests.parallel.cases import KINDS, Lazy, make, serial_mesh, values


class Pairs:
    """A data set over the fields of one batch."""

    def __init__(self, fields: tuple[np.ndarray, ...]) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields[0])

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(field[index] for field in self.fields)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("microbatch", [0, 1])
def test_one_reduction_of_the_gradients_a_step(microbatch: int) -> None:
    """And a small one of the losses, one of each microbatch of all ranks."""
    mesh = Mesh()
    step = make("gpt", mesh, microbatch=microbatch)
    fields = KINDS["gpt"].batch(9, 0)
    before = mesh.ledger.snapshot()
    step(fields)
    sent = mesh.ledger.snapshot() - before
    assert list(sent) == ["dp"] and list(sent["dp"]) == ["all_reduce"]
    assert sent["dp"]["all_reduce"].calls == 2
    losses = 8 * count(9, microbatch, mesh.size)
    assert sent["dp"]["all_reduce"].bytes == step.optimizer.storage.grad.nbytes + losses


def test_gradients_are_those_of_the_mean_loss(mesh: Mesh) -> None:
    """Of the whole batch, written out without `parallelize`, on every rank."""
    fields = KINDS["mlp"].batch(7, 0)
    step = make("mlp", mesh, microbatch=2, lr=0.0)
    found = step(fields)
    model = KINDS["mlp"].model().to(np.float64)
    model.load_state_dict(step.model.state_dict())
    loss = KINDS["mlp"].loss(model(Tensor(fields[0])), fields[1])
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-13)
    total = 0.0
    for own, other in zip(step.model.parameters(), model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        np.testing.assert_allclose(own.grad.numpy(), other.grad.numpy(), rtol=0, atol=1e-14)
        total += float((other.grad.numpy() ** 2).sum())
    assert step.grad_norm == pytest.approx(np.sqrt(total), rel=1e-12)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_clipping_bounds_the_whole_gradient(mesh: Mesh, clip: float) -> None:
    """The norm is that of the sum over ranks, before clipping; 0 means no limit."""
    step = make("mlp", mesh, lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip=clip)
    before = values(step)
    step(KINDS["mlp"].batch(7, 0))
    moved = sum(((array - before[name]) ** 2).sum() for name, array in values(step).items())
    norm = step.grad_norm
    assert 0.01 < norm < 100
    assert np.sqrt(moved) == pytest.approx(min(norm, clip or norm), rel=2e-4)


def test_a_rank_loads_its_own_samples(mesh: Mesh) -> None:
    batch = Lazy(KINDS["mlp"].batch(7, 0))
    make("mlp", mesh, microbatch=2)(batch)
    assert batch.asked == [part.samples for part in microbatches(7, 2, mesh["dp"])]


def test_batches_of_every_form(mesh: Mesh) -> None:
    """Tuples, lists, tensors, lazy batches and float32 fields: the same samples, the same step."""
    x, y = (field.astype(np.float32) for field in KINDS["own"].batch(5, 0))
    forms: list[Any] = [(x, y), [x, y], (Tensor(x), Tensor(y)), Lazy((x, y))]
    forms += [(x.astype(np.float64), y.astype(np.float64)), (x.tolist(), y.tolist())]
    steps = [make("own", mesh, microbatch=2) for _ in forms]
    losses = [step(form) for step, form in zip(steps, forms, strict=True)]
    assert losses == [losses[0]] * len(forms)
    for step in steps[1:]:
        for name, array in values(steps[0]).items():
            np.testing.assert_array_equal(values(step)[name], array)


@pytest.mark.parametrize("kind", ["own", "gpt"])
def test_batches_of_a_torch_loader(mesh: Mesh, kind: str) -> None:
    torch = pytest.importorskip("torch")
    fields = KINDS[kind].batch(8, 0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.tensor, fields)), batch_size=5
    )
    theirs, ours = make(kind, mesh, microbatch=2), make(kind, mesh, microbatch=2)
    for batch, part in zip(loader, (slice(0, 5), slice(5, 8)), strict=True):
        assert theirs(batch) == ours(tuple(field[part] for field in fields))


def test_model_that_returns_its_loss(mesh: Mesh) -> None:
    """loss=None: the model gets every field; a batch may be a single array."""

    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(np.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return ((x - self.place) ** 2).sum(1).mean()

    x = np.random.default_rng(0).normal(size=(5, 3))
    found = []
    for batch in (x, (x,), Batches(Pairs((x,)), 5, None).__iter__().__next__()):
        step = hpcml.parallelize(Centre(), optimizer=SGD, lr=0.5, mesh=mesh, microbatch=2)
        assert step(batch) == pytest.approx((x**2).sum(1).mean())
        found.append(values(step)["place"])
    for place in found:
        np.testing.assert_allclose(place, x.mean(0), atol=1e-14)


def test_half_precision_fields_become_the_models_type(mesh: Mesh) -> None:
    import ml_dtypes

    x, y = KINDS["own"].batch(5, 0)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        rough = (x.astype(dtype), y.astype(dtype))
        same = tuple(field.astype(np.float64) for field in rough)
        assert make("own", mesh)(rough) == make("own", mesh)(same)


def test_samples_are_numbered_from_step_to_step(mesh: Mesh) -> None:
    """Dropout depends on a sample's number, so it must not depend on how batches were given."""
    fields = KINDS["own"].batch(8, 0)
    plain, numbered = make("own", mesh), make("own", mesh, microbatch=1)
    losses = []
    for start, stop in ((0, 3), (3, 8)):
        assert plain.samples == start
        losses.append(plain(tuple(field[start:stop] for field in fields)))
        batch = Lazy(tuple(field[start:stop] for field in fields))
        batch.first = start  # type: ignore[attr-defined]
        numbered.samples = 77  # the batch's word counts
        assert numbered(batch) == pytest.approx(losses[-1], rel=1e-12)
        assert numbered.samples == stop
    other = make("own", mesh)
    other.samples = 1
    assert other(tuple(field[0:3] for field in fields)) != losses[0]


def test_evaluate(mesh: Mesh) -> None:
    """The mean over samples, not over batches, without dropout."""
    step = make("own", mesh, microbatch=2)
    sizes = [5, 3, 1]
    batches = [KINDS["own"].batch(size, i) for i, size in enumerate(sizes)]
    x, y = (np.concatenate(fields) for fields in zip(*batches, strict=True))
    before = values(step)
    found = step.evaluate(batches)
    step.model.eval()
    expected = ((step.model(Tensor(x)).numpy() - y) ** 2).mean()
    assert found == pytest.approx(expected, rel=1e-12)
    assert step.evaluate(iter(batches)) == found
    whole = Batches(Pairs((x, y)), 4, None)
    assert step.evaluate(whole) == pytest.approx(expected, rel=1e-12)
    assert step.samples == 0
    for name, array in values(step).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_keeps_the_mode(mesh: Mesh, training: bool) -> None:
    """Of every module: a user may hold some of them in evaluation, and after an error too."""
    step = make("own", mesh)
    step.model.train(training)
    step.model.again.eval()
    step.evaluate([KINDS["own"].batch(3, 0)])
    step.try_batch(KINDS["own"].batch(1, 0))
    with pytest.raises(ValueError, match="linear"):
        step.try_batch((np.zeros((1, 9)), np.zeros((1, 1))))
    assert step.model.training is training and step.model.drop.training is training
    assert step.model.again.training is False


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the numbers that are wanted
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_non_finite_values_stop_all_ranks_before_the_update(mesh: Mesh, fault: str) -> None:
    """Even if only one rank has met them; what was good stays, and training could go on."""
    step = make("own", mesh, "float32", loss=lambda out, y: (out * y).mean())
    good = KINDS["own"].batch(5, 0)
    step(good)
    before = values(step)
    x, y = (field.copy() for field in good)
    if fault == "loss":
        x[0] = np.nan
    else:
        step.model.head.bias.data[...], y[0] = 0.0, 3e38
        step.model.head.weight.data[...] = 0.0  # so that the loss is zero
        before = values(step)
        step.model.head.register_forward_hook(lambda module, args, out: out * 1e3)
    with pytest.raises(NonFiniteError, match=r"step 1: loss .*, gradient norm (nan|inf)"):
        step((x, y))
    for name, array in values(step).items():
        np.testing.assert_array_equal(array, before[name])
    assert np.isfinite(step(good))


def test_what_the_optimizer_leaves_out(mesh: Mesh) -> None:
    """Stays as it is, and its gradient does not add up from step to step."""
    step = make("mlp", mesh, groups=lambda model: [model.layers[0].weight], lr=0.0)
    left = step.model.layers[2].weight
    seen = []
    for _ in range(2):
        step(KINDS["mlp"].batch(5, 0))
        seen.append(None if left.grad is None else left.grad.numpy().copy())
    np.testing.assert_equal(seen[0], seen[1])
    assert step.optimizer.storage.parameters == [step.model.layers[0].weight]


def test_seed_is_that_of_manual_seed() -> None:
    def made(**options: Any) -> dict[str, np.ndarray]:
        model = KINDS["mlp"].model()
        return values(hpcml.parallelize(model, optimizer=SGD, mesh=serial_mesh(), **options))

    hpcml.manual_seed(9)
    default = made()
    hpcml.manual_seed(0)
    for name, array in made(seed=9).items():
        np.testing.assert_array_equal(array, default[name])
        assert not array.size or (array != made()[name]).any()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero": 4}, ["zero.stage=4", "0, 1, 2 or 3"]),
        ({"zero": 1, "shard_ranks": 7}, ["zero.shard_ranks=7", "must divide", "0: all"]),
        ({"zero": 1, "zero_split": "rows"}, ['zero.split="rows"', "blocks", "layers"]),
        ({"bucket_mb": 0.0}, ["bucket_mb=0.0", "more than 0"]),
        ({"bucket_mb": float("inf")}, ["bucket_mb=inf", "finite"]),
        ({"microbatch": -1}, ["microbatch=-1", "or more"]),
        ({"grad_clip": -0.5}, ["grad_clip=-0.5", "or more"]),
        ({"grad_clip": float("nan")}, ["grad_clip=nan"]),
    ],
)
def test_settings_that_cannot_be(mesh: Mesh, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make("mlp", mesh, **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.mpi(min_size=2)
def test_axes_of_ones_own() -> None:
    with pytest.raises(UserError, match=r"mesh.rows=\d is not available .* mesh.rows=1"):
        make("mlp", Mesh({"rows": Mesh().size}))


def test_optimizer_that_is_none(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="optimizer made a list"):
        hpcml.parallelize(KINDS["mlp"].model(), optimizer=list, mesh=mesh)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((np.zeros((4, 6)), np.zeros((3, 1))), r"\[3, 4\] samples"),
        ((np.zeros((0, 6)), np.zeros((0, 1))), "0 samples"),
        ({"x": np.zeros((4, 6)), "y": np.zeros((4, 1))}, "not a mapping"),
    ],
)
def test_batches_that_cannot_be(mesh: Mesh, batch: Any, words: str) -> None:
    """All ranks refuse alike, before anything is communicated."""
    step = make("own", mesh)
    with pytest.raises(UserError, match=words):
        step(batch)
    with pytest.raises(UserError, match=words):
        step.evaluate([batch])


def test_evaluate_of_nothing(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="no samples"):
        make("own", mesh).evaluate([])


def test_loss_that_is_no_mean() -> None:
    """A loss for each sample."""
    step: Step = make("own", serial_mesh(), loss=nn.MSELoss(reduction="none"))
    with pytest.raises(UserError, match="one element"):
        step(KINDS["own"].batch(5, 0))


def test_threads_of_some_ranks_only(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that were given a number keep it, the others take theirs: nobody waits for ever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(backend, "_threads", 2 if mesh.rank == 0 else 0)
    hpcml.parallelize(nn.Linear(2, 1), loss=nn.MSELoss(), optimizer=SGD, lr=0.1, mesh=mesh)
    assert backend.threads() == (2 if mesh.rank == 0 else 1)
