"""What a user's own forward calls on blocks: as on one rank, or refused on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor, cat, stack
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from hpcml.nn import functional as F
from tests.parallel.cases import name_of, ranks_of, serial_mesh, values
from tests.parallel.spatial.models import Scale

cases = pytest.mark.parametrize
Function = Callable[[Any, Tensor, Tensor], Tensor]


class Own(nn.Module):
    """Two convolutions, and between them what `function` makes of the pixels and a vector."""

    def __init__(self, function: Function, spatial: dict[str, str] | None = None) -> None:
        super().__init__()
        self.function, self.spatial = function, spatial or {}
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.scale, self.line = Scale(4), nn.Linear(2, 4)
        self.mix, self.norm, self.batch = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x).tanh(), v))


class Heads(Own):
    """The region ends at a layer, which may be called twice; `function` gets what it gives."""

    def __init__(self, style: str, function: Function) -> None:
        super().__init__(function, {"pool": style})
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        x = self.first(x)
        return self.function(self, x, self.fc(self.pool(x.tanh()).flatten(1)))


def places_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def attention(x: Tensor) -> Tensor:
    """Over channels, of each pixel by itself."""
    x = places_last(x).unsqueeze(-1)
    return ((x @ x.transpose(-1, -2)).softmax(-1) @ x).squeeze(-1).permute(0, 3, 1, 2)


def per_row(net: Any, x: Tensor, _: Tensor) -> Tensor:
    """Softmax over heights: whole where ranks divide the width alone."""
    return x * x.softmax(2) + x.amax(2, keepdim=True)


SAME: dict[str, Function] = {
    "layers of a vector": lambda net, x, v: (
        x * net.batch(net.line(v))[:, :, None, None] + net.line(v).reshape(-1, 4, 1, 1)
    ),
    "own scale": lambda net, x, v: net.scale(x),
    "channels last": lambda net, x, v: net.norm(net.mix(places_last(x))).permute(0, 3, 1, 2),
    "channel attention": lambda net, x, v: attention(x),
    "over channels": lambda net, x, v: (
        x.softmax(1) * x.mean(1, keepdim=True) + x.var(1).sqrt()[:, None]
    ),
    "channels chosen": lambda net, x, v: cat([x[:, [3, 1]], x[:, :2], x[:, 3:, ...]], 1)[:, 1:],
    "shuffled groups": lambda net, x, v: (
        x.reshape(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    ),
    "masks": lambda net, x, v: (
        x.masked_fill(x > 0.1, 0.5).clamp(-0.3, 0.4) * (x.argmax(1, True) == 1)
    ),
    "more channels": lambda net, x, v: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "detached": lambda net, x, v: x + stack([x.detach(), Tensor(x.data)], 1).mean(1),
    "a crop of nothing": lambda net, x, v: x[:, :, : x.shape[2], 0:],
}  # fmt: skip
REFUSED: dict[str, tuple[Function, str]] = {
    "a mean, turned": (lambda net, x, v: x * places_last(x).mean((1, 2))[..., None, None], "mean"),
    "a mean of means": (lambda net, x, v: x * x.mean(1).mean((1, 2), True)[:, None], "mean"),
    "normalised places": (lambda net, x, v: x / x.std((2, 3), keepdim=True), "mean"),
    "pairs of places": (lambda net, x, v: x @ x.transpose(-1, -2) @ x, "matmul"),
    "differences of places": (
        lambda net, x, v: x + (x[..., None] - x[..., None, :]).amax(-1), "sub",
    ),
    "coordinates": (lambda net, x, v: x * Tensor(np.linspace(-1, 1, x.shape[3])), "mul"),
    "out of sight": (lambda net, x, v: x + Tensor(np.sort(x.numpy(), -1)), "add"),
    "a crop": (lambda net, x, v: x[:, :, :, 1:], "getitem"),
    "neighbours": (lambda net, x, v: cat([x, x], 3), "cat"),
    "a border": (lambda net, x, v: F.pad(x, (1, 1)), "pad"),
    "joined places": (lambda net, x, v: x.flatten(2).reshape(*x.shape), "reshape"),
    "split places": (lambda net, x, v: x.reshape(*x.shape[:-1], 2, -1).flatten(3), "reshape"),
    "width for channels": (
        lambda net, x, v: net.mix(x.transpose(1, 2)).transpose(1, 2), "linear",
    ),
    "a batch norm": (
        lambda net, x, v: F.batch_norm(x, None, None, training=True), "batch_norm",
    ),
    "turned round": (lambda net, x, v: net.last(x.transpose(2, 3))[:, :1] * x, "gets"),
    "unknown": (lambda net, x, v: net.last(Tensor(x.numpy() * 2))[:, :1] * x, "gets an array"),
}  # fmt: skip


def batch(step: int) -> Any:
    random = np.random.default_rng([9, step])
    images, vectors = random.normal(size=(5, 1, 6, 4)), random.normal(size=(5, 2))
    return images, vectors, random.normal(size=(5, 3, 6, 4))


def trained(model: nn.Module, mesh: Mesh, target: Any = None) -> Any:
    step = hpcml.parallelize(
        model.to(np.float64), loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, lr=0.1, seed=2,
        mesh=mesh, microbatch=3,
    )  # fmt: skip
    losses = []
    for number in range(2):
        x, v, pixels = batch(number)
        losses.append(step((x, v, pixels if target is None else target)))
    return losses, values(step)


def same(make: Callable[[], nn.Module], layout: dict[str, int], target: Any = None) -> None:
    losses, parameters = trained(make(), serial_mesh(), target)
    for found in on_threads(
        lambda: trained(make(), Mesh(**layout), target), ranks=ranks_of(layout)
    ):
        np.testing.assert_allclose(found[0], losses, rtol=1e-12)
        for name, array in parameters.items():
            np.testing.assert_allclose(found[1][name], array, rtol=0, atol=1e-12, err_msg=name)


def refused(
    make: Callable[[], nn.Module], layout: dict[str, int], message: str, target: Any = None
) -> None:
    def program() -> str:
        with pytest.raises(UserError, match=message) as raised:
            trained(make(), Mesh(**layout), target)
        return str(raised.value)

    lines = on_threads(program, ranks=ranks_of(layout), timeout=20)
    assert len(set(lines)) == 1 and "\n" not in lines[0]


@cases("what", SAME)
def test_followed(what: str) -> None:
    same(lambda: Own(SAME[what]), {"sp_h": 2, "sp_w": 2})


def test_what_is_not_divided_is_whole() -> None:
    same(lambda: Own(per_row), {"sp_w": 3})
    refused(lambda: Own(per_row), {"sp_h": 2}, r"calls softmax on \(3, 4, height, 4\)")


@cases("layout", [{"sp_w": 3}, {"sp_w": 4}], ids=name_of)
@cases("what", REFUSED)
def test_refused(what: str, layout: dict[str, int]) -> None:
    """Blocks of two places and of one, and of one alone."""
    function, name = REFUSED[what]
    refused(lambda: Own(function), layout, name if name.startswith("gets") else f"calls {name} on ")


@cases("style", ["gather", "samples"])
def test_after_the_end(style: str) -> None:
    """Two layers may end the region; what is left of blocks, and of samples, is no whole."""
    target, layout = np.random.default_rng(1).normal(size=(5, 3)), {"sp_h": 2}

    def made(function: Function) -> Callable[[], nn.Module]:
        return lambda: Heads(style, function)

    same(made(lambda net, x, y: y + net.fc(net.pool(x).flatten(1))), layout, target)
    late = r"Heads gets blocks of images that sp_h divides, after another layer has ended"
    refused(made(lambda net, x, y: y + x.mean((2, 3))[:, :3]), layout, late, target)
    centred = made(lambda net, x, y: y - y.mean(0, keepdim=True))
    if style == "gather":
        same(centred, layout, target)
    else:
        refused(centred, layout, r"Heads calls mean on \(samples, 3\), samples that", target)
