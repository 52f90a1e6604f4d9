"""The multi-layer perceptron."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.autograd import Tensor
from hpcml.models import MLP


def test_linear_regression_without_hidden_layers() -> None:
    model = MLP(3, 2, hidden=()).name_parts()
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    layer = model.layers[0]
    expected = x @ layer.weight.numpy().T + layer.bias.numpy()
    np.testing.assert_allclose(model(Tensor(x)).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "sigmoid"])
def test_as_in_pytorch(activation: str) -> None:
    torch = pytest.importorskip("torch")
    model = MLP(12, 4, (8, 5), activation).name_parts().double()
    kind = {"relu": "ReLU", "gelu": "GELU", "tanh": "Tanh", "sigmoid": "Sigmoid"}[activation]
    between = getattr(torch.nn, kind)
    sizes = [(12, 8), (8, 5), (5, 4)]
    layers = [part for pair in sizes for part in (torch.nn.Linear(*pair), between())][:-1]
    peer = torch.nn.Sequential(*layers).double()
    state = {k.removeprefix("layers."): torch.tensor(v.numpy()) for k, v in
             model.state_dict().items()}  # fmt: skip
    peer.load_state_dict(state)
    x = np.random.default_rng(0).normal(size=(5, 3, 4))
    found, expected = model(Tensor(x)), peer(torch.tensor(x).flatten(1))
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=1e-12, atol=1e-14)
    found.sum().backward()
    expected.sum().backward()
    for own, other in zip(model.parameters(), peer.parameters(), strict=True):
        assert own.grad is not None
        np.testing.assert_allclose(own.grad.numpy(), other.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r'activation="swish".*relu, gelu, tanh, sigmoid'):
        MLP(3, 2, activation="swish")


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="out_features=0"):
        MLP(3, 2, hidden=(0,))
