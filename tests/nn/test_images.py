"""Convolutions, pooling, batch normalisation and interpolation, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from hpcml import backend, nn
from hpcml.autograd import Tensor, no_grad
from hpcml.errors import UserError
from hpcml.kernels.cpu import team
from hpcml.nn import functional as F
from tests.autograd.support import Array, assert_close, layouts, leaf, normal, same_as_torch
from tests.nn.support import image_network

torch = pytest.importorskip("torch")
TF = torch.nn.functional
DTYPES = ["float32", "float64"]
cases = pytest.mark.parametrize


def random_convolution(number: int) -> tuple[list[Array], int, dict[str, Any]]:
    """Image, weight and bias, the number of dimensions, and options that fit them."""
    generator = np.random.default_rng(number)

    def some(values: Any, dims: int) -> tuple[int, ...]:
        return tuple(int(n) for n in generator.choice(values, dims))

    dims = int(generator.integers(1, 4))
    kernel = some([1, 3, 5, 7] if dims < 3 else [1, 2, 3], dims)
    stride, dilation, padding = some([1, 2], dims), some([1, 2], dims), some([0, 1, 2, 3], dims)
    sizes = tuple(
        max(d * (k - 1) + 1 - 2 * p, 1) + int(generator.integers(0, 6))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    groups = int(generator.choice([1, 1, 2, 3]))
    channels, filters = (groups * int(generator.choice([1, 2, 5, 17, 20])) for _ in range(2))
    shapes = (2, channels, *sizes), (filters, channels // groups, *kernel), (filters,)
    dtype = DTYPES[number % 2]
    arrays = [normal(*shape, dtype=dtype, salt=number) for shape in shapes]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return arrays, dims, options


@cases("number", range(60))
def test_random_convolutions(number: int) -> None:
    arrays, dims, options = random_convolution(number)
    same_as_torch(
        lambda *a: getattr(F, f"conv{dims}d")(*a, **options),
        lambda *a: getattr(TF, f"conv{dims}d")(*a, **options),
        *arrays[: 2 + number % 2], factor=10,
    )  # fmt: skip


@cases("dtype", DTYPES)
def test_winograd(dtype: str) -> None:
    ours, theirs = (
        library.Sequential(
            library.Conv2d(16, 20, 3, padding=1), library.ReLU(), library.Conv2d(20, 16, 3, 2)
        ).to(dtype if library is nn else getattr(torch, dtype))
        for library in (nn, torch.nn)
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, 16, 9, 6, dtype=dtype)
    plain = ours(leaf(x)).numpy()
    nn.use_winograd(ours)
    same_as_torch(ours, theirs, x, factor=5)
    assert (ours(leaf(x)).numpy() != plain).any()


@cases("number", range(30))
def test_random_transposed_convolutions(number: int) -> None:
    (_, weight, _), dims, options = random_convolution(number)
    groups, dtype = options["groups"], str(weight.dtype)
    image = normal(2, len(weight), *range(3, 3 + dims), dtype=dtype)
    bias = normal(weight.shape[1] * groups, dtype=dtype)
    least = zip(weight.shape[2:], options["dilation"], strict=True)
    options["padding"] = tuple(min(p, (k - 1) * d // 2) for p, (k, d) in zip(
        options["padding"], least, strict=True))  # fmt: skip
    if number % 3 == 0:
        options["output_padding"] = tuple(s - 1 for s in options["stride"])
    name = f"conv_transpose{dims}d"
    same_as_torch(
        lambda *a: getattr(F, name)(*a, **options), lambda *a: getattr(TF, name)(*a, **options),
        image, weight, bias, factor=10,
    )  # fmt: skip


@cases("dtype", DTYPES)
def test_an_empty_batch(dtype: str) -> None:
    x, w, b = normal(0, 2, 5, 5, dtype=dtype), normal(3, 2, 3, 3, dtype=dtype), normal(3)
    same_as_torch(
        lambda *a: F.conv2d(*a, padding=1), lambda *a: TF.conv2d(*a, padding=1), x, w,
        b.astype(dtype),
    )  # fmt: skip
    same_as_torch(
        lambda *a: F.conv_transpose2d(*a, stride=2), lambda *a: TF.conv_transpose2d(*a, stride=2),
        x, w[:2], b.astype(dtype)[:2],
    )  # fmt: skip
    widths = (1, 2, 0, 3)
    for mode in ("reflect", "replicate", "circular"):
        same_as_torch(
            lambda a, m=mode: F.pad(a, widths, m), lambda a, m=mode: TF.pad(a, widths, m), x
        )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@cases("padding", ["same", "valid"])
@cases("kernel", [(1, 1), (3, 2), (4, 5)])
def test_padding_by_name_is_uneven_for_even_filters(kernel: tuple[int, ...], padding: str) -> None:
    x, w = normal(2, 3, 9, 10), normal(4, 3, *kernel)
    for layout in layouts(x).values():
        same_as_torch(
            lambda *a: F.conv2d(*a, None, 1, padding, (1, 2)),
            lambda *a: TF.conv2d(*a, None, 1, padding, (1, 2)), layout, w,
        )  # fmt: skip


def channels_last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(
        0, x.ndim - 1, *range(1, x.ndim - 1)
    )


@cases("dtype", DTYPES)
def test_images_that_lie_channels_last_or_strided(dtype: str) -> None:
    x, w, b = normal(2, 20, 6, 7, dtype=dtype), normal(8, 20, 3, 3, dtype=dtype), normal(8)
    for layout in [*layouts(x).values(), channels_last(x), np.repeat(x, 2, 3)[..., ::2]]:
        same_as_torch(
            lambda *a: F.conv2d(*a, 2, 1), lambda *a: TF.conv2d(*a, 2, 1), layout, w,
            b.astype(dtype), factor=5,
        )  # fmt: skip


def test_layers_in_a_row_keep_images_channels_last() -> None:
    """And their gradients: the first image and its gradient are all that is turned."""
    lies: list[bool] = []

    def last(array: Array) -> bool:
        return bool(array.transpose(0, 2, 3, 1).flags.c_contiguous)

    def note(module: Any, args: Any, out: Tensor) -> None:
        lies.append(last(out.data))

    def note_gradient(module: Any, of_input: Any, of_output: Any) -> None:
        lies.append(last(of_output[0].data))

    model = image_network(nn)
    layers = list(model)[:9]
    for layer in layers:
        layer.register_forward_hook(note)
        layer.register_full_backward_hook(note_gradient)
    out = model(leaf(normal(2, 3, 9, 8, dtype="float32")))
    out.backward(normal(*out.shape, dtype="float32"))
    assert len(lies) == 2 * len(layers) and all(lies), lies


@cases("dtype", DTYPES)
def test_a_network_computes_what_it_does_in_torch(dtype: str) -> None:
    """With running estimates that both move, and by those in evaluation."""
    ours, theirs = image_network(nn), image_network(torch.nn)
    ours.load_state_dict(theirs.state_dict())
    ours.to(dtype)
    theirs.to(getattr(torch, dtype))
    for mode in (True, True, False):
        ours.train(mode)
        theirs.train(mode)
        same_as_torch(ours, theirs, normal(2, 3, 9, 8, dtype=dtype), factor=100)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert_close(state[name].numpy(), value.numpy(), dtype, 10)
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad.numpy(), peers[name].grad.numpy(), dtype, 300)


@cases("dtype", DTYPES)
@cases("training", [True, False])
@cases("sizes", [(5, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (300, 1, 20, 20)], ids=str)
def test_batch_norm(sizes: tuple[int, ...], training: bool, dtype: str) -> None:
    x = (normal(*sizes, dtype=dtype) * 2 + 7).astype(dtype)
    weight, bias = (normal(sizes[1], dtype=dtype, salt=i) for i in (1, 2))
    estimates = np.zeros(sizes[1], dtype), np.ones(sizes[1], dtype)
    ours, theirs = [Tensor(e) for e in estimates], [torch.tensor(e.copy()) for e in estimates]
    options = {"training": training, "momentum": 0.3}
    for layout in layouts(x).values():
        for given in ((weight, bias), ()):
            same_as_torch(
                lambda x, *a: F.batch_norm(x, *ours, *a, **options),
                lambda x, *a: TF.batch_norm(x, *theirs, *a, **options),
                layout, *given, factor=100,
            )  # fmt: skip
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found.numpy(), expected.numpy(), dtype, 10)


def test_moments_of_many_large_numbers_are_accurate() -> None:
    x = (normal(100_000, 2, dtype="float32") + 1000).astype("float32")
    mean, variance = Tensor(np.zeros(2, np.float32)), Tensor(np.zeros(2, np.float32))
    F.batch_norm(Tensor(x), mean, variance, training=True, momentum=1.0)
    np.testing.assert_allclose(mean.numpy(), x.mean(0, dtype=float), rtol=1e-7)
    np.testing.assert_allclose(variance.numpy(), x.var(0, dtype=float, ddof=1), rtol=1e-4)


def test_estimates_are_buffers_of_a_module() -> None:
    """With momentum None they are means of all so far; `to` keeps what they are."""
    layer, peer = nn.BatchNorm1d(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None)
    for number in range(3):
        x = normal(4, 3, dtype="float32", salt=number)
        layer(Tensor(x))
        peer(torch.tensor(x))
    assert [name for name, _ in layer.named_buffers()] == [n for n, _ in peer.named_buffers()]
    for name, value in peer.named_buffers():
        assert_close(getattr(layer, name).numpy(), value.numpy(), "float32")
    copy = nn.BatchNorm1d(3)
    copy.load_state_dict(layer.state_dict())
    assert int(copy.num_batches_tracked) == 3  # type: ignore[arg-type]
    np.testing.assert_array_equal(copy.running_var.numpy(), layer.running_var.numpy())  # type: ignore[union-attr]
    assert copy.running_var.data is not layer.running_var.data  # type: ignore[union-attr]
    for given, kept in (("fp64", "float64"), ("bf16", "float32")):
        copy.to(backend.dtype(given))
        assert copy.running_mean.dtype == kept and copy.num_batches_tracked.dtype == "int64"  # type: ignore[union-attr]
        assert copy.state_dict()["running_mean"].dtype == kept
    copy.running_mean = Tensor(np.ones(3))
    assert (copy.state_dict()["running_mean"].numpy() == 1).all()
    copy.running_mean = None
    assert "running_mean" not in copy.state_dict()
    with pytest.raises(UserError, match="running_var is missing"):
        nn.BatchNorm1d(3).load_state_dict({"weight": np.ones(3), "bias": np.ones(3)})


def test_no_estimates_no_evaluation_by_them() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False).eval()
    x = normal(4, 3, dtype="float32")
    same_as_torch(layer, torch.nn.BatchNorm1d(3, track_running_stats=False).eval(), x)
    with no_grad():
        assert not layer(Tensor(x)).requires_grad


POOLS = [
    ((2, 3, 9), (3,), {"stride": 2, "padding": 1}),
    ((2, 3, 9), (2,), {"ceil_mode": True}),
    ((2, 3, 1, 5), (2,), {"ceil_mode": True}),
    ((1, 2, 7, 8), ((3, 2),), {"stride": (2, 3), "padding": (1, 0), "ceil_mode": True}),
    ((0, 2, 4, 4), (2,), {}),
    ((2, 17, 5, 6), (3, 1, 1), {}),
    ((1, 2, 4, 5, 6), (2,), {"stride": 1}),
    ((1, 2, 5, 5, 5), (3,), {"stride": 2, "padding": 1, "ceil_mode": True}),
]


@cases("dtype", DTYPES)
@cases(("sizes", "arguments", "options"), POOLS, ids=str)
def test_pools(
    sizes: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], dtype: str
) -> None:
    dims = len(sizes) - 2

    def pool(library: Any, name: str) -> Any:
        return lambda x, **more: getattr(library, name)(x, *arguments, **options, **more)

    kinds: list[tuple[str, dict[str, Any]]] = [
        ("max", {}), ("max", {"dilation": 2}), ("avg", {}), ("avg", {"count_include_pad": False}),
    ]  # fmt: skip
    for kind, more in kinds:
        if more.get("dilation") and min(sizes[2:]) < 5:
            continue
        name = f"{kind}_pool{dims}d"
        for layout in layouts(normal(*sizes, dtype=dtype)).values():
            same_as_torch(
                partial(pool(F, name), **more), partial(pool(TF, name), **more), layout
            )  # fmt: skip


@cases("dtype", DTYPES)
@cases(
    ("sizes", "wanted"),
    [((2, 3, 7), 3), ((2, 3, 7, 6), 1), ((2, 3, 7, 6), (3, None)), ((1, 2, 4, 5, 3), (2, 7, 1))],
    ids=str,
)
def test_adaptive_pools(sizes: tuple[int, ...], wanted: Any, dtype: str) -> None:
    name = f"adaptive_avg_pool{len(sizes) - 2}d"
    for layout in layouts(normal(*sizes, dtype=dtype)).values():
        same_as_torch(
            lambda x: getattr(F, name)(x, wanted), lambda x: getattr(TF, name)(x, wanted), layout
        )


@cases("dtype", DTYPES)
@cases("dims", [1, 2, 3])
@cases(
    "how",
    [{"size": 7}, {"scale_factor": 2}, {"scale_factor": 1.7}, {"scale_factor": 0.6}, {"size": 1}],
    ids=str,
)
def test_interpolation(how: dict[str, Any], dims: int, dtype: str) -> None:
    linear = ("linear", "bilinear", "trilinear")[dims - 1]
    x = normal(2, 3, *range(4, 4 + dims), dtype=dtype)
    for mode in (
        {"mode": "nearest"}, {"mode": linear}, {"mode": linear, "align_corners": True},
    ):  # fmt: skip
        same_as_torch(
            partial(F.interpolate, **how, **mode), partial(TF.interpolate, **how, **mode), x,
            factor=5,
        )  # fmt: skip
        same_as_torch(nn.Upsample(**how, **mode), torch.nn.Upsample(**how, **mode), x, factor=5)


@cases("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    for sizes, widths in [((2, 3, 5), (2, 1)), ((1, 2, 4, 5), (3, 0, 1, 2))]:
        for x in [*layouts(normal(*sizes)).values(), channels_last(normal(*sizes))]:
            same_as_torch(
                partial(F.pad, pad=widths, mode=mode), partial(TF.pad, pad=widths, mode=mode), x
            )
    for padding in (2, "same"):
        ours, theirs = (
            library.Conv2d(2, 3, (3, 4), padding=padding, padding_mode=mode)
            for library in (nn, torch.nn)
        )
        ours.load_state_dict(theirs.state_dict())
        same_as_torch(ours, theirs, normal(2, 2, 6, 7, dtype="float32"), factor=5)


def test_two_threads_compute_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "LEAST", 1)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(backend, "_threads", threads)
        model = image_network(nn)
        model.name_parts()
        x = leaf(normal(4, 3, 9, 8, dtype="float32"))
        out = model(x)
        out.backward(normal(*out.shape, dtype="float32"))
        results.append([out.data, x.gradient, *[p.gradient for p in model.parameters()]])
    for one, two in zip(*results, strict=True):
        assert_close(two, one, "float32", 5)


A, W = normal(2, 4, 5, 6), normal(6, 2, 3, 3)
MISTAKES: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: nn.Conv2d(3, 4, 3, groups=2), ["Conv2d", "in_channels=3", "groups=2"]),
    (lambda: nn.Conv1d(4, 3, 3, groups=4), ["Conv1d", "out_channels=3", "groups=4"]),
    (lambda: nn.ConvTranspose2d(4, 3, 3, groups=2), ["ConvTranspose2d", "out_channels=3"]),
    (lambda: nn.Conv2d(3, 4, (3, 3, 3)), ["Conv2d", "kernel_size=(3, 3, 3)", "2 of them"]),
    (lambda: nn.Conv2d(3, 4, 3, stride=0), ["Conv2d", "stride=0", "at least 1"]),
    (lambda: nn.Conv2d(3, 4, 3, padding=-1), ["padding=-1", "at least 0"]),
    (lambda: nn.Conv2d(3, 4, 3, padding="some"), ['padding="some"', "same"]),
    (lambda: nn.Conv2d(3, 4, 3, padding_mode="odd"), ['padding_mode="odd"', "reflect"]),
    (lambda: nn.ConvTranspose1d(3, 4, 3, padding_mode="reflect"), ["reflect", "zeros"]),
    (lambda: nn.BatchNorm2d(0), ["BatchNorm2d", "num_features=0"]),
    (lambda: F.conv2d(leaf(A), leaf(W)), ["conv2d", "4 channels", "(6, 2, 3, 3)", "groups=1"]),
    (lambda: F.conv2d(leaf(A[0]), leaf(W), groups=2), ["conv2d", "3 dimensions", "(N, C, H, W)"]),
    (lambda: F.conv2d(leaf(A), leaf(W), leaf(normal(2)), groups=2), ["(2,)", "(6,)"]),
    (
        lambda: F.conv2d(leaf(A), leaf(W), groups=2, dilation=3),
        ["(3, 3)", "dilation (3, 3)", "(5, 6)", "pad more"],
    ),
    (lambda: F.conv2d(leaf(A), leaf(W), None, 2, "same", groups=2), ['"same"', "stride 1"]),
    (
        lambda: F.conv_transpose2d(leaf(A), leaf(W)),
        ["conv_transpose2d", "4 channels", "(6, 2, 3, 3)"],
    ),
    (
        lambda: F.conv_transpose2d(leaf(A), leaf(normal(4, 2, 3, 3)), output_padding=1),
        ["output_padding=1", "below stride"],
    ),
    (
        lambda: F.conv_transpose2d(leaf(A), leaf(normal(4, 2, 3, 3)), padding=4),
        ["padding=(4, 4)", "(5, 6)"],
    ),
    (lambda: F.max_pool2d(leaf(A), 7), ["max_pool2d", "(7, 7)", "(5, 6)"]),
    (lambda: F.avg_pool2d(leaf(A), 2, padding=2), ["avg_pool2d", "padding=2", "window of 2"]),
    (lambda: F.max_pool2d(leaf(normal(1, 1, 300, 300)), 257), ["kernel_size=257", "65536"]),
    (lambda: F.adaptive_avg_pool2d(leaf(A), 0), ["adaptive_avg_pool2d", "output_size=(0, 0)"]),
    (lambda: F.interpolate(leaf(A)), ["size=None", "scale_factor=None"]),
    (lambda: F.interpolate(leaf(A), 3, mode="linear"), ['mode="linear"', "nearest, bilinear"]),
    (lambda: F.interpolate(leaf(A), 3, align_corners=True), ["align_corners=True"]),
    (lambda: F.pad(leaf(A), (6, 0), "reflect"), ["(6, 0)", '"reflect"', "0 to 5"]),
    (lambda: F.pad(leaf(A), (1, 0), "odd"), ['mode="odd"', "circular"]),
    (lambda: F.batch_norm(leaf(A[:1, :, :1, :1]), None, None, training=True), ["(1, 4, 1, 1)"]),
    (lambda: F.batch_norm(leaf(A), None, None), ["running_mean", "train without"]),
    (lambda: F.batch_norm(leaf(A), None, None, leaf(normal(3)), training=True), ["(3,)"]),
    (lambda: nn.BatchNorm2d(3)(leaf(A)), ["BatchNorm2d", "4 channels in 4", "3 in 4"]),
]


@cases(("function", "parts"), MISTAKES)
def test_a_mistake_is_one_line(function: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_a_layer_says_its_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)).name_parts()
    with pytest.raises(UserError, match=r"^0 \(Conv2d\): .*takes 3 \* groups channels"):
        model(Tensor(A.astype("float32")))
    with pytest.raises(UserError, match=r"^1 \(BatchNorm2d\): "):
        model(Tensor(A[:, :3].astype("float32")))
