"""Functions and layers without parameters of their own, against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import backend, nn
from hpcml.autograd import Tensor, gradcheck
from hpcml.nn import functional as F
from tests.autograd.support import layouts, leaf, normal, same_as_torch

torch = pytest.importorskip("torch")
TF = torch.nn.functional
DTYPES = ["float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(4, 3), (2, 5, 3), (3,), (0, 3), (1, 1, 1, 3)], ids=str)
def test_linear(sizes: tuple[int, ...], dtype: str) -> None:
    x, w, b = (normal(*s, dtype=dtype, salt=i) for i, s in enumerate([sizes, (5, 3), (5,)]))
    for kind in layouts(x):
        same_as_torch(F.linear, TF.linear, *(layouts(a)[kind] for a in (x, w, b)))
        same_as_torch(F.linear, TF.linear, layouts(x)[kind], w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: str) -> None:
    for sizes in [(3, 4), (), (1,), (0, 2), (2, 3, 70)]:
        for x in layouts(normal(*sizes, dtype=dtype) * 3).values():
            same_as_torch(F.gelu, TF.gelu, x)
            same_as_torch(
                lambda x: F.gelu(x, approximate="tanh"), lambda x: TF.gelu(x, approximate="tanh"),
                x,
            )  # fmt: skip
            same_as_torch(nn.GELU("tanh"), torch.nn.GELU("tanh"), x)
            for ours, theirs in ((F.relu, TF.relu), (F.tanh, torch.tanh), (F.sigmoid, TF.sigmoid)):
                same_as_torch(ours, theirs, x)
            for name in ("ReLU", "Tanh", "Sigmoid", "GELU", "Flatten"):
                if name != "Flatten" or x.ndim > 1:
                    same_as_torch(getattr(nn, name)(), getattr(torch.nn, name)(), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 4), (2, 0), (0, 4), (1, 1), (2, 3, 4, 5)], ids=str)
def test_softmax(sizes: tuple[int, ...], dtype: str) -> None:
    for x in layouts(normal(*sizes, dtype=dtype) * 50).values():
        for dim in (0, 1, -1):
            same_as_torch(lambda x, d=dim: F.softmax(x, d), lambda x, d=dim: TF.softmax(x, d), x)
            same_as_torch(
                lambda x, d=dim: F.log_softmax(x, d), lambda x, d=dim: TF.log_softmax(x, d), x
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "normed"), [((4, 6), 1), ((2, 3, 4), 2), ((5,), 1), ((0, 3), 1), ((3, 1), 1)], ids=str
)
def test_layer_norm(sizes: tuple[int, ...], normed: int, dtype: str) -> None:
    last = sizes[-normed:]
    x, w, b = (normal(*s, dtype=dtype, salt=i) for i, s in enumerate([sizes, last, last]))
    x = (x * 3 + 5).astype(dtype)
    for kind in layouts(x):
        parts = [layouts(a)[kind] for a in (x, w, b)]
        for given in (parts, parts[:2], parts[:1]):
            same_as_torch(
                lambda x, *r: F.layer_norm(x, last, *r, eps=1e-3),
                lambda x, *r: TF.layer_norm(x, last, *r, eps=1e-3),
                *given, factor=10,
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: str, reduction: str) -> None:
    generator = np.random.default_rng(0)
    for sizes in [(5, 4), (1, 1), (2, 4, 3), (2, 4, 3, 2), (3, 70)]:
        x = normal(*sizes, dtype=dtype) * 5
        target = generator.integers(0, sizes[1], (sizes[0], *sizes[2:]))
        ignoring = target.copy()
        ignoring.flat[1::2] = -100
        for t, ignored in ((target, -100), (ignoring, -100), (target, int(target.flat[0]))):
            if reduction == "mean" and (t == ignored).all():
                continue
            options: dict[str, Any] = {"ignore_index": ignored, "reduction": reduction}
            peer = torch.tensor(t)
            for layout in layouts(x).values():
                same_as_torch(
                    lambda x, t=t, o=options: F.cross_entropy(x, t, **o),
                    lambda x, t=peer, o=options: TF.cross_entropy(x, t, **o),
                    layout,
                )
            same_as_torch(
                lambda x, t=t, o=options: nn.CrossEntropyLoss(**o)(x, Tensor(t.astype(np.int32))),
                lambda x, t=peer, o=options: torch.nn.CrossEntropyLoss(**o)(x, t),
                x,
            )


def test_cross_entropy_of_nothing_and_of_large_logits() -> None:
    assert np.isnan(F.cross_entropy(leaf(normal(2, 3)), np.array([-100, -100])).item())
    empty = leaf(np.empty((0, 3)))
    loss = F.cross_entropy(empty, np.empty(0, np.int64), reduction="sum")
    loss.backward()
    assert loss.item() == 0 and empty.gradient is not None and empty.gradient.shape == (0, 3)
    x = np.array([[1e4, -1e4, 0], [80, 81, 79]], np.float32)
    same_as_torch(
        lambda x: F.cross_entropy(x, np.array([1, 2])),
        lambda x: TF.cross_entropy(x, torch.tensor([1, 2])), x,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_with_repeated_indices(dtype: str) -> None:
    w = normal(6, 3, dtype=dtype)
    for index in ([0, 5, 5, 5, 2], [[1, 1], [1, 1]], 4, [], [[[3]]]):
        i = np.array(index, np.int64)
        for copy in layouts(w).values():
            same_as_torch(
                lambda w, i=i: F.embedding(i, w) * F.embedding(Tensor(i), w),
                lambda w, i=i: TF.embedding(torch.tensor(i), w) ** 2,
                copy,
            )
    small = leaf(w)
    for kind in (np.int16, np.uint8, np.uint64):
        F.embedding(np.array([1, 2, 1], kind), small).sum().backward()
    np.testing.assert_array_equal(small.gradient[:3, 0], [0, 6, 3])  # type: ignore[index]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss(reduction: str) -> None:
    options = {"reduction": reduction}

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b, reduction=reduction)

    def theirs(a: Any, b: Any) -> Any:
        return TF.mse_loss(a, b, reduction=reduction)

    for sizes in [(3, 4), (), (1,)]:
        x, y = normal(*sizes, dtype="float32"), normal(*sizes, dtype="float32", salt=1)
        same_as_torch(ours, theirs, x, y)
        same_as_torch(nn.MSELoss(**options), torch.nn.MSELoss(**options), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "kernel", "options"),
    [
        ((2, 3, 7, 8), (4, 3, 3, 3), {}),
        ((1, 1, 5, 5), (1, 1, 1, 1), {"stride": 2}),
        ((2, 2, 9, 8), (3, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        ((1, 2, 9, 9), (2, 2, 3, 3), {"dilation": (2, 3), "padding": 2}),
        ((2, 1, 8, 8), (2, 1, 3, 3), {"stride": 3, "padding": 1, "dilation": 2}),
        ((0, 2, 5, 5), (3, 2, 3, 3), {"padding": 1}),
    ],
    ids=str,
)
def test_conv2d(
    sizes: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any], dtype: str
) -> None:
    x, w, b = (normal(*s, dtype=dtype) for s in (sizes, kernel, kernel[:1]))
    for kind in ("plain", "transposed", "strided"):
        parts = [layouts(a)[kind] for a in (x, w, b)]
        for given in (parts, parts[:2]):
            same_as_torch(
                lambda *a: F.conv2d(*a, **options), lambda *a: TF.conv2d(*a, **options), *given,
                factor=4,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize(
    ("sizes", "arguments"),
    [
        ((2, 3, 6, 8), (2,)), ((1, 2, 7, 7), (3, 2)), ((2, 1, 5, 6), ((2, 3), (1, 2))),
        ((1, 1, 6, 6), (3, 2, 1)), ((1, 2, 6, 5), ((2, 4), 2, (1, 2))), ((0, 1, 4, 4), (2,)),
    ],
    ids=str,
)  # fmt: skip
def test_pooling(name: str, sizes: tuple[int, ...], arguments: tuple[Any, ...], dtype: str) -> None:
    for x in layouts(normal(*sizes, dtype=dtype)).values():
        same_as_torch(
            lambda x: getattr(F, name)(x, *arguments), lambda x: getattr(TF, name)(x, *arguments), x
        )


@pytest.mark.parametrize("arguments", [(2,), (3, 1), (3, 2, 1), ((2, 3), (1, 2), 1)], ids=str)
def test_the_first_of_equal_maxima_gets_the_gradient(arguments: tuple[Any, ...]) -> None:
    ties = np.random.default_rng(0).integers(0, 3, (2, 2, 7, 6)).astype(float)
    for x in (ties, np.zeros((1, 1, 6, 6)), -ties, np.where(ties > 1, np.inf, ties)):
        same_as_torch(
            lambda x: F.max_pool2d(x, *arguments), lambda x: TF.max_pool2d(x, *arguments), x
        )
    holes = normal(1, 2, 8, 8)
    holes[..., ::3, ::3] = np.nan  # one in a window at most: NaN is the largest of all
    same_as_torch(
        lambda x: F.max_pool2d(x, *arguments), lambda x: TF.max_pool2d(x, *arguments), holes
    )


def test_pad() -> None:
    x = normal(2, 3, 4)
    for widths in [(1, 2), (0, 1, 2, 0), (1, 1, 1, 1, 1, 1)]:
        same_as_torch(
            lambda x, w=widths: F.pad(x, w, value=2.5),
            lambda x, w=widths: TF.pad(x, w, value=2.5),
            x,
        )


def test_composition_by_finite_differences() -> None:
    arrays = [normal(1, 2, 6, 6), normal(3, 2, 3, 3), normal(3), normal(4, 12)]

    def network(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = F.max_pool2d(F.gelu(F.conv2d(x, w, b, padding=1)), 3, padding=1)
        y = F.linear(y.flatten(1), v)
        return F.cross_entropy(y, np.array([2]))

    assert gradcheck(network, [leaf(a) for a in arrays])


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_sixteen_bits_stay_sixteen_bits(name: str) -> None:
    """Values and gradients to the precision of the type; a loss keeps all its bits."""
    dtype = backend.dtype(name)
    arrays = [normal(4, 8).astype(dtype), normal(8, 8).astype(dtype), normal(8).astype(dtype)]
    results = []
    for kind in (dtype, np.dtype(np.float32)):
        x, w, b = (leaf(a.astype(kind)) for a in arrays)
        y = F.gelu(F.layer_norm(F.linear(x, w, b), (8,), b)) * 0.5 + x.tanh() / 2
        loss = F.cross_entropy(y, np.array([1, 2, 3, 0]))
        loss.backward()
        results.append([loss.numpy(), *[t.gradient for t in (x, w, b)]])
        assert loss.dtype == np.float32 and {a.dtype for a in results[-1][1:]} == {kind}
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.05)
