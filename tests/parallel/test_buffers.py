"""Running estimates and metrics of a step: once a step, alike on all ranks, in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.comm import Mesh, run
from hpcml.comm.alone import Alone
from hpcml.models import MeshNet, ResNet
from hpcml.nn.evaluation import accuracy
from hpcml.optim import SGD
from hpcml.parallel import Step

SIZE = (9, 10)
MODELS = {
    "resnet": lambda: ResNet(2, 3, width=2, small_images=True),
    "meshnet": lambda: MeshNet(2, 3, SIZE, widths=(3, 2), convs=2),
}


def batch(kind: str, size: int, step: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng([size, step])
    shape = (size, *SIZE) if kind == "meshnet" else (size,)
    return random.normal(size=(size, 2, *SIZE)), random.integers(0, 3, shape)


def make(kind: str, mesh: Mesh, **options: Any) -> Step:
    return hpcml.parallelize(
        MODELS[kind]().double(), loss=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.05, momentum=0.9,
        mesh=mesh, seed=3, metrics={"accuracy": accuracy}, **options,
    )  # fmt: skip


def trained(kind: str, mesh: Mesh, size: int = 7, steps: int = 2, **options: Any) -> Any:
    """Loss and accuracy of steps, then parameters, buffers and what a validation finds."""
    step = make(kind, mesh, **options)
    seen = [(step(batch(kind, size, number)), step.scores["accuracy"]) for number in range(steps)]
    step.settle()
    parameters = {name: array.copy() for name, array in step.gathered()}
    found = step.measure([batch(kind, 4, 9), batch(kind, 3, 10)])
    return seen, parameters, step.gathered_buffers(), found


def serially(kind: str, **options: Any) -> Any:
    return trained(kind, Mesh(Alone()), **options)


def compare(found: Any, expected: Any, exact: bool = False) -> None:
    """Numbers by numbers, the number of batches too."""
    atol = 0 if exact else 1e-12
    for mine, other in zip(found[:1] + found[3:], expected[:1] + expected[3:], strict=True):
        mine, other = (list(x.values()) if isinstance(x, dict) else x for x in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=0 if exact else 1e-11)
    for mine, other in zip(found[1:3], expected[1:3], strict=True):
        assert list(mine) == list(other)
        for name, array in mine.items():
            np.testing.assert_allclose(array, other[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("resnet", {"dp": 2}, {}),
        ("resnet", {"dp": 3}, {"zero": 1}),
        ("meshnet", {"dp": 3}, {"zero": 2}),  # a rank has none of the last microbatches
        ("resnet", {"dp": 4}, {"zero": 3}),
        ("meshnet", {"pp": 2}, {}),
        ("resnet", {"pp": 2}, {"activations": "drop"}),
        ("resnet", {"pp": 2, "dp": 2}, {"zero": 1}),
        ("meshnet", {"pp": 2}, {"schedule": "interleaved", "chunks": 2}),
    ],
    ids=str,
)
def test_any_layout_is_like_one_rank(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    expected = serially(kind, microbatch=2)
    ranks = int(np.prod(list(layout.values())))
    every = run(lambda: trained(kind, Mesh(**layout), microbatch=2, **options), ranks=ranks)
    for found in every:
        compare(found, expected)


def test_the_same_bits_in_deterministic_mode() -> None:
    def program(**layout: int) -> Any:
        mesh = Mesh(deterministic=True, **layout)
        return trained("resnet", mesh, size=11, microbatch=2)

    expected = run(program, ranks=1)[0]
    for layout in ({"dp": 2}, {"dp": 3}, {"pp": 2}):
        for found in run(lambda of=layout: program(**of), ranks=max(layout.values())):
            compare((*found[:3],), (*expected[:3],), exact=True)


def test_one_update_from_the_mean_of_microbatches() -> None:
    """Of a microbatch's mean and unbiased variance, by samples; once for batches held together."""
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Flatten(), nn.Linear(180, 3)).double()
    step = hpcml.parallelize(
        model, loss=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, mesh=Mesh(Alone()), microbatch=3
    )
    first, second = batch("resnet", 5, 0), batch("resnet", 4, 1)
    with step.no_sync():
        step(first)
    step(second)
    parts = [first[0][:3], first[0][3:], second[0][:3], second[0][3:]]
    sizes = [len(part) for part in parts]
    found = step.gathered_buffers()
    means = [part.mean((0, 2, 3)) for part in parts]
    variances = [part.swapaxes(0, 1).reshape(2, -1).var(1, ddof=1) for part in parts]
    mean, variance = (np.average(x, axis=0, weights=sizes) for x in (means, variances))
    np.testing.assert_allclose(found["0.running_mean"], 0.3 * mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found["0.running_var"], 0.7 + 0.3 * variance, rtol=1e-12)
    assert found["0.num_batches_tracked"] == 1


@pytest.mark.parametrize("kind", MODELS)
def test_metrics_are_means_over_all_samples(kind: str) -> None:
    """Whatever the batches and microbatches that they come in."""

    def program() -> Any:
        step = make(kind, Mesh(dp=2), microbatch=2)
        step(batch(kind, 4, 0))
        batches = [batch(kind, size, 1 + size) for size in (4, 3, 6)]
        hits = [step.predict(images).argmax(1) == labels for images, labels in batches]
        return step.measure(batches)["accuracy"], np.concatenate(hits).mean()

    for found, expected in run(program, ranks=2):
        assert found == pytest.approx(expected, abs=1e-14)


def test_evaluation_and_errors_leave_them_alone() -> None:
    step = make("resnet", Mesh(Alone()))
    step(batch("resnet", 4, 0))
    before = step.gathered_buffers()
    step.measure([batch("resnet", 4, 1)])
    images, labels = batch("resnet", 4, 2)
    with pytest.raises(hpcml.errors.NonFiniteError):
        step((images * np.nan, labels))
    with pytest.raises(IndexError, match="target"):
        step((images, labels + 7))
    for name, array in step.gathered_buffers().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "options",
    [{"mode": "local", "period": 2}, {"mode": "async", "staleness": 1}],
    ids=["local", "async"],
)
def test_ranks_that_train_apart(options: dict[str, Any]) -> None:
    """Each has estimates of its own samples; results have the mean, on all ranks the same."""

    def program() -> Any:
        step = make("resnet", Mesh(dp=2), microbatch=2, **options)
        for number in range(3):
            step(batch("resnet", 8, number))
        own = {name: np.array(one.data) for name, one in step.buffers.named}
        step.settle()
        return own, step.gathered_buffers(), step.measure([batch("resnet", 5, 9)])

    (one, found, measured), (other, again, as_well) = run(program, ranks=2)
    assert measured == as_well
    for name, array in found.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_allclose(array, (one[name] + other[name]) / 2, rtol=1e-12, atol=1e-14)
    assert not np.array_equal(one["bn1.running_mean"], other["bn1.running_mean"])
    assert one["bn1.num_batches_tracked"] == 3


def test_pipelines_without_a_flush() -> None:
    """One update a batch, whenever the gradients come."""

    def program() -> Any:
        step = make("meshnet", Mesh(pp=2), microbatch=2, schedule="pipedream", activations="drop")
        for number in range(3):
            step(batch("meshnet", 6, number))
        step.settle()
        return step.gathered_buffers()

    found, other = run(program, ranks=2)
    for name, array in found.items():
        np.testing.assert_array_equal(array, other[name])
        if name.endswith("tracked"):
            assert array == 3
        else:  # all have moved from what they were, by as much as three updates can
            first = name.endswith("var")
            assert not np.isclose(array, first).any()
            assert (np.abs(array - first * 0.9**3) < 1).all()


def test_metrics_that_cannot_be() -> None:
    class Own(nn.Linear):
        def forward(self, x: Any, y: Any) -> Any:
            return nn.functional.cross_entropy(super().forward(x), y)

    with pytest.raises(hpcml.errors.UserError, match="metrics=accuracy of a model that returns"):
        hpcml.parallelize(
            Own(3, 2), optimizer=SGD, lr=0.1, mesh=Mesh(Alone()), metrics={"accuracy": accuracy}
        )


@pytest.mark.mpi
def test_under_mpi() -> None:
    expected = serially("resnet", microbatch=2)
    compare(trained("resnet", Mesh(), microbatch=2, zero=2), expected)
