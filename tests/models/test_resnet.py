"""ResNet: torchvision's names and sizes, first values, and outputs and gradients of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.models import ResNet


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_published_sizes(depth: int, count: int) -> None:
    """Those of torchvision's models, with ImageNet's 1,000 classes; nothing is allocated."""
    model = ResNet(3, 1000, depth)
    assert sum(p.numel() for p in model.parameters()) == count
    assert not any(p.has_values for p in model.parameters())


def test_names_are_torchvisions() -> None:
    names = list(ResNet(3, 10, width=2).name_parts().state_dict())
    assert names[:7] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
        "bn1.num_batches_tracked", "layer1.0.conv1.weight",
    ]  # fmt: skip
    assert "layer2.0.downsample.0.weight" in names
    assert "layer4.1.bn2.running_var" in names
    assert not any(name.startswith("layer1.0.downsample") for name in names)
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert len(names) == 122


def test_deviation_of_first_values() -> None:
    """He's, by the number of weights that an input has (fan out)."""
    model = ResNet(3, 10, width=16).name_parts()
    values = model.layer3[0].conv2.weight.numpy()
    assert abs(values.std() * math.sqrt(64 * 9 / 2) - 1) < 0.02
    assert abs(values.mean()) < 0.002


@pytest.mark.parametrize(
    ("depth", "small_images", "size"), [(18, True, (9, 7)), (50, False, (37, 33))]
)
def test_as_in_pytorch(depth: int, small_images: bool, size: tuple[int, ...]) -> None:
    """A state dict loads as it is; then outputs, gradients and running estimates are the same."""
    torch = pytest.importorskip("torch")
    from tests.models.peer_images import PeerResNet

    peer = PeerResNet(2, 5, depth, 3, small_images).double()
    model = ResNet(2, 5, depth, 3, small_images).name_parts().double()
    model.load_state_dict(peer.state_dict())
    x = np.random.default_rng(0).normal(size=(3, 2, *size))
    found, expected = model(Tensor(x)), peer(torch.tensor(x))
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=1e-9, atol=1e-10)
    weights = np.random.default_rng(1).normal(size=found.shape)
    found.backward(weights)
    expected.backward(torch.tensor(weights))
    _compare(model, peer)


def _compare(model: Any, peer: Any) -> None:
    """Gradients, relative to the largest of each, and the state."""
    theirs = dict(peer.named_parameters())
    for name, own in model.named_parameters():
        other = theirs[name].grad.numpy()
        atol = 1e-9 * max(np.abs(other).max(), 1e-6)
        np.testing.assert_allclose(own.grad.numpy(), other, rtol=0, atol=atol, err_msg=name)
    state = model.state_dict()
    for name, other in peer.state_dict().items():
        atol = 1e-9 * float(other.abs().max())  # a mean may be near zero
        np.testing.assert_allclose(state[name].numpy(), other.numpy(), 0, atol, err_msg=name)


def test_unknown_depth() -> None:
    with pytest.raises(UserError, match=r"depth=20.*18, 34, 50"):
        ResNet(3, 10, depth=20)
