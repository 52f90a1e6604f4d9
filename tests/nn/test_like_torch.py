"""Layers have PyTorch's names, shapes, signatures, first values and results."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from tests.autograd.support import assert_close
from tests.nn.support import network

torch = pytest.importorskip("torch")

LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Linear": ((3, 4), {}),
    "Linear without bias": ((3, 4), {"bias": False}),
    "Embedding": ((5, 3), {}),
    "LayerNorm": ((4,), {}),
    "LayerNorm of two": (((2, 4),), {"eps": 1e-3}),
    "LayerNorm without bias": ((4,), {"bias": False}),
    "LayerNorm without weights": ((4,), {"elementwise_affine": False}),
    "MultiheadAttention": ((8, 2), {}),
    "MultiheadAttention without bias": ((8, 2), {"bias": False}),
    "Dropout": ((0.1,), {}),
    "GELU": ((), {}),
    "ReLU": ((), {}),
    "Tanh": ((), {}),
    "Sigmoid": ((), {}),
    "Flatten": ((), {}),
    "CrossEntropyLoss": ((), {}),
    "MSELoss": ((), {}),
    "Conv1d": ((4, 6, 3), {}),
    "Conv2d": ((4, 6, (3, 2)), {"groups": 2, "stride": 2, "padding": 1}),
    "Conv2d without bias": ((4, 6, 3), {"bias": False, "padding": "same"}),
    "Conv3d": ((2, 3, 2), {"dilation": 2, "padding_mode": "circular"}),
    "ConvTranspose1d": ((4, 6, 3), {"stride": 2, "output_padding": 1}),
    "ConvTranspose2d": ((4, 6, 3), {"groups": 2}),
    "ConvTranspose3d": ((2, 3, 2), {"bias": False}),
    **{f"{kind}Pool{d}d": ((2,), {}) for kind in ("Max", "Avg", "AdaptiveAvg") for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": ((3,), {}) for d in (1, 2, 3)},
    "BatchNorm2d without weights": ((3,), {"affine": False}),
    "BatchNorm1d without estimates": ((3,), {"track_running_stats": False}),
    "Upsample": ((), {"scale_factor": 2}),
}


def pair(name: str) -> tuple[Any, Any]:
    arguments, options = LAYERS[name]
    kind = name.split()[0]
    return getattr(nn, kind)(*arguments, **options), getattr(torch.nn, kind)(*arguments, **options)


def shapes(module: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in module.state_dict().items()]


@pytest.mark.parametrize("name", LAYERS)
def test_state_has_the_names_shapes_and_order_of_torch(name: str) -> None:
    ours, theirs = pair(name)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[key].numpy(), value.numpy())


@pytest.mark.parametrize("name", LAYERS)
def test_first_values_are_distributed_as_in_torch(name: str) -> None:
    torch.manual_seed(0)
    kind = name.split()[0]
    arguments: dict[str, tuple[Any, ...]] = {
        "Linear": (200, 300), "Embedding": (200, 300), "MultiheadAttention": (200, 4),
        **{f"{kind}{d}d": (20, 400, 3) for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)},
    }  # fmt: skip
    sizes = arguments.get(kind, LAYERS[name][0])
    ours, theirs = (getattr(lib, kind)(*sizes, **LAYERS[name][1]) for lib in (nn, torch.nn))
    for key, value in theirs.state_dict().items():
        found, expected = ours.state_dict()[key].numpy(), value.numpy()
        spread = expected.std()
        assert abs(found.std() - spread) <= 0.15 * spread
        assert abs(found.mean() - expected.mean()) <= 0.3 * spread
        assert abs(np.abs(found).max() - np.abs(expected).max()) <= 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in LAYERS} | {"ModuleList"}))
def test_signatures_of_layers_fit_torch(name: str) -> None:
    for method in ("__init__", "forward"):
        if name == "ModuleList" and method == "forward":
            continue
        check_signature(
            getattr(getattr(nn, name), method), getattr(getattr(torch.nn, name), method)
        )


def check_signature(ours: Any, theirs: Any) -> None:
    """Same positional parameters in the same order, same defaults."""
    mine, peers = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    positional = [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(peers)[: len(positional)]
    for name, parameter in mine.items():
        if name in peers and name != "modules":
            assert parameter.default == peers[name].default, name


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        "layer_norm",
        "dropout",
        "embedding",
        "cross_entropy",
        "mse_loss",
        "tanh",
        "sigmoid",
        "batch_norm",
        "interpolate",
    ],
)
def test_signatures_of_functions_fit_torch(name: str) -> None:
    check_signature(getattr(F, name), getattr(torch.nn.functional, name))


def test_signatures_that_torch_does_not_tell() -> None:
    documented = {
        "linear": "input weight bias", "gelu": "input approximate",
        "softmax": "input dim", "log_softmax": "input dim", "pad": "input pad mode value",
        **{f"conv{d}d": "input weight bias stride padding dilation groups" for d in (1, 2, 3)},
        **{
            f"conv_transpose{d}d": "input weight bias stride padding output_padding groups dilation"
            for d in (1, 2, 3)
        },
        **{
            f"max_pool{d}d": "input kernel_size stride padding dilation ceil_mode"
            for d in (1, 2, 3)
        },
        **{
            f"avg_pool{d}d": "input kernel_size stride padding ceil_mode count_include_pad"
            for d in (1, 2, 3)
        },
        **{f"adaptive_avg_pool{d}d": "input output_size" for d in (1, 2, 3)},
        "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale",
    }  # fmt: skip
    for name, expected in documented.items():
        parameters = inspect.signature(getattr(F, name)).parameters.values()
        found = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert found == expected.split(), name


def test_a_torch_network_loads_and_computes_the_same() -> None:
    ours, theirs = network(nn), network(torch.nn)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    tokens = np.array([[1, 6, 6]])

    def forward(net: Any, x: Any) -> Any:
        x = net[0](x)
        for layer in net[1]:
            x = layer(x)
        return net[2](x)

    out = forward(ours, Tensor(tokens))
    expected = forward(theirs, torch.tensor(tokens))
    assert_close(out.numpy(), expected.detach().numpy(), "float32")
    out.sum().backward()
    expected.sum().backward()
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad.numpy(), peers[name].grad.numpy(), "float32")  # type: ignore[union-attr]
