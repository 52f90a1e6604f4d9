"""MeshNet: every pixel of images and volumes of any size, as in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.models import MeshNet
from hpcml.nn import PixelShuffle


@pytest.mark.parametrize("size", [(33, 18), (6, 9, 7)], ids=str)
def test_every_pixel_has_logits(size: tuple[int, ...]) -> None:
    model = MeshNet(2, 3, size, widths=(4, 6, 5), convs=2).name_parts()
    x = np.random.default_rng(0).normal(size=(2, 2, *size)).astype(np.float32)
    out = model(Tensor(x))
    assert out.shape == (2, 3, *size)
    out.sum().backward()
    assert all(p.grad is not None and np.isfinite(p.grad.numpy()).all() for p in model.parameters())


def test_pixels_of_a_volume() -> None:
    """Channel c of pixel p is channel c * factor^3 + (p mod factor) of place p // factor."""
    x = np.random.default_rng(0).normal(size=(2, 3 * 8, 2, 3, 2))
    found = PixelShuffle(2, (4, 5, 3))(Tensor(x)).numpy()
    assert found.shape == (2, 3, 4, 5, 3)
    for c, i, j, k in np.ndindex(found.shape[1:]):
        inner = 4 * (i % 2) + 2 * (j % 2) + k % 2
        np.testing.assert_array_equal(
            found[:, c, i, j, k], x[:, 8 * c + inner, i // 2, j // 2, k // 2]
        )


def test_as_in_pytorch() -> None:
    torch = pytest.importorskip("torch")
    from tests.models.peer_images import PeerMeshNet

    peer = PeerMeshNet(2, 3, (4, 6, 5), 2).double()
    model = MeshNet(2, 3, (12, 8), (4, 6, 5), 2).name_parts().double()
    model.load_state_dict(dict(zip(model.state_dict(), peer.state_dict().values(), strict=True)))
    x = np.random.default_rng(0).normal(size=(2, 2, 12, 8))
    found, expected = model(Tensor(x)), peer(torch.tensor(x))
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=1e-9, atol=1e-11)
    weights = np.random.default_rng(1).normal(size=found.shape)
    found.backward(weights)
    expected.backward(torch.tensor(weights))
    for own, other in zip(model.parameters(), peer.parameters(), strict=True):
        assert own.grad is not None
        np.testing.assert_allclose(own.grad.numpy(), other.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_image_that_is_too_small() -> None:
    with pytest.raises(UserError, match=r"an image of 3 x 40 is smaller than the 4 pixels"):
        MeshNet(2, 3, (3, 40), widths=(4, 6, 5))


@pytest.mark.parametrize(("size", "widths"), [((9,), (4,)), ((9, 9), ()), ((9, 9), (4, 0))])
def test_what_makes_no_network(size: tuple[int, ...], widths: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="2 or 3 dimensions, and there must be at least one"):
        MeshNet(2, 3, size, widths)
