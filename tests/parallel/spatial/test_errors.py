"""What cannot be divided is refused in one line that names the layer or the key, on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from hpcml.nn import functional as F
from tests.parallel.cases import serial_mesh
from tests.parallel.spatial.models import Classifier

cases = pytest.mark.parametrize


class Net(nn.Module):
    """A convolution, something, and perhaps a linear layer."""

    def __init__(self, middle: nn.Module, fc: bool = False, spatial: Any = None) -> None:
        super().__init__()
        self.conv, self.middle = nn.Conv2d(1, 2, 3, padding=1), middle
        self.fc = nn.Linear(2, 3) if fc else None
        if spatial is not None:
            self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv(x))
        return x if self.fc is None else self.fc(x)


class Mean(nn.Module):
    """Joins all places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


MEAN = {"middle": "pointwise"}
"""Which it is not."""


class Odd(nn.Module):
    """Calls something that takes what it gets for the whole."""

    def __init__(self, function: Any, last: Any = None) -> None:
        super().__init__()
        self.function, self.last = function, last or nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(x))


class Own(nn.Conv2d):
    """With a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * 2.0)


REFUSED: dict[str, tuple[Any, tuple[int, ...], dict[str, int], str]] = {
    "image smaller than the grid": (
        lambda: Net(nn.ReLU()), (2, 1, 5, 1), {"sp_w": 2},
        r"the input: images of \(5, 1\) cannot be cut along its width among 2 ranks: .*sp_w=1",
    ),
    "fewer outputs than ranks": (
        lambda: Net(nn.MaxPool2d(4)), (2, 1, 9, 6), {"sp_h": 3},
        r"middle \(MaxPool2d\): outputs of \(2, 1\) cannot be cut along its height among 3 ranks",
    ),
    # Ranks at the edge refused these alone, and the one between waited for them.
    "mirrored by more than there is": (
        lambda: Net(nn.Conv2d(2, 2, 11, padding=5, padding_mode="reflect")), (2, 1, 9, 5),
        {"sp_w": 3}, r"middle \(Conv2d\): padding \(5, 5\) about 5 of \(9, 5\): .*0 to 4",
    ),
    "around by more than there is": (
        lambda: Net(nn.Conv2d(2, 2, 13, padding=6, padding_mode="circular")), (2, 1, 9, 5),
        {"sp_h": 2}, r"middle \(Conv2d\): padding \(6, 6\) about 5 of \(9, 5\): .*0 to 5",
    ),
    "no depth": (
        lambda: Net(nn.ReLU()), (2, 1, 5, 6), {"sp_d": 2}, r"mesh.sp_d=2 cuts .* mesh.sp_d=1"
    ),
    "no images": (lambda: Net(nn.ReLU()), (2, 6), {"sp_w": 2}, r"sp_w cuts images \(N, C, ...\)"),
    "flatten": (
        lambda: Net(nn.Flatten()), (2, 1, 5, 6), {"sp_w": 2},
        r'middle \(Flatten\) calls reshape on \(2, 2, 5, width\), .*spatial = {"middle": "gather"}',
    ),
    "linear": (
        lambda: Net(Mean(), fc=True, spatial=MEAN), (2, 1, 5, 6), {"sp_w": 2},
        r'middle \(Mean\) is declared "pointwise" and makes 2 dimensions of images that sp_w',
    ),
    "turned at the end": (
        lambda: Net(Odd(nn.ReLU(), lambda x: x.permute(0, 2, 3, 1))), (2, 1, 5, 6), {"sp_h": 2},
        r"Net ends with \(2, height, 6, 2\)",
    ),
    "layer norm": (
        lambda: Net(nn.LayerNorm((5, 6))), (2, 1, 5, 6), {"sp_w": 2}, r"middle \(LayerNorm\) gets"
    ),
    "own convolution": (
        lambda: Net(Own(2, 2, 3)), (2, 1, 5, 6), {"sp_h": 2}, r"middle \(Own\) gets"
    ),
    "pooling to few": (
        lambda: Net(nn.AdaptiveAvgPool2d(1)), (2, 1, 5, 6), {"sp_h": 2},
        r"middle \(AdaptiveAvgPool2d\): outputs of \(1, 1\) .* \(spatial in the",
    ),
    "a function": (
        lambda: Net(Odd(lambda x: F.avg_pool2d(x, 3, 1, 1))), (2, 1, 10, 5), {"sp_h": 2},
        r"middle \(Odd\) calls resample on \(2, 2, height, 5\), blocks of images that sp_h divides",
    ),
    "a slice": (
        lambda: Net(Odd(lambda x: x[:, :, 1:])), (2, 1, 10, 5), {"sp_h": 2},
        r"middle \(Odd\) calls getitem",
    ),
    "a flip": (
        lambda: Net(Odd(lambda x: x[:, :1, ...] + x[..., ::-1, :])), (2, 1, 10, 5), {"sp_h": 2},
        r"middle \(Odd\) calls getitem",
    ),
    "a mean": (
        lambda: Net(Odd(lambda x: x * x.mean((2, 3), keepdim=True))), (2, 1, 10, 5), {"sp_h": 2},
        r"middle \(Odd\) calls mean",
    ),
    "tokens": (
        lambda: Net(Odd(lambda x: x.flatten(2))), (2, 1, 10, 5), {"sp_h": 2},
        r"middle \(Odd\) calls reshape",
    ),
    "unknown style": (
        lambda: Net(nn.ReLU(), spatial={"middle": "scatter"}), (2, 1, 5, 6), {"sp_h": 2},
        r'Net.spatial: "middle": "scatter" is unknown: use pointwise, gather or samples',
    ),
    "unknown name": (
        lambda: Net(nn.ReLU(), spatial={"pool": "gather"}), (2, 1, 5, 6), {"sp_h": 2},
        r'Net.spatial: no module is called "pool": there are conv, middle',
    ),
    "tensor parallel": (
        lambda: Net(nn.ReLU()), (2, 1, 5, 6), {"sp_h": 2, "tp": 2}, r"mesh.tp=2 with sp_h=2: .*tp=1"
    ),
    "context parallel": (
        lambda: Net(nn.ReLU()), (2, 1, 5, 6), {"sp_h": 2, "cp": 2}, r"mesh.cp=2 with sp_h=2"
    ),
    "pipeline": (
        lambda: Net(nn.ReLU()), (2, 1, 5, 6), {"sp_h": 2, "pp": 2}, r"mesh.pp=2 with sp_h=2"
    ),
}  # fmt: skip


def train(model: nn.Module, mesh: Mesh, x: Any) -> None:
    step = hpcml.parallelize(model, loss=nn.MSELoss(), optimizer=hpcml.optim.SGD, lr=0.1, mesh=mesh)
    step((x, x))


@cases("what", REFUSED)
def test_refused(what: str) -> None:
    make, shape, layout, message = REFUSED[what]

    def program() -> None:
        with pytest.raises(UserError, match=message) as raised:
            train(make(), Mesh(**layout), np.zeros(shape, np.float32))
        assert "\n" not in str(raised.value)

    on_threads(program, ranks=int(np.prod(list(layout.values()))))


UNFIT: dict[str, tuple[Any, str]] = {
    "channels": (lambda: nn.Conv2d(3, 2, 3), "2 channels came"),
    "channels of a transposed one": (lambda: nn.ConvTranspose2d(3, 2, 3), "2 channels came"),
    "features": (lambda: nn.BatchNorm2d(5), "2 channels in 4 dimensions came, and it takes 5 in 4"),
    "window": (lambda: nn.Conv2d(2, 2, 11), r"\(11, 11\) .* image of \(9, 5\)"),
    "maximum": (lambda: nn.MaxPool2d(6), r"\(6, 6\) .* image of \(9, 5\)"),
    "mean": (lambda: nn.AvgPool2d(6), r"\(6, 6\) .* image of \(9, 5\)"),
    "mirror": (
        lambda: nn.Conv2d(2, 2, 13, padding=6, padding_mode="reflect"),
        r"padding \(6, 6\) about 5 of \(9, 5\): .*0 to 4",
    ),
    "resized by what": (nn.Upsample, "give either size=None or scale_factor=None"),
    "shuffled": (lambda: nn.PixelShuffle(3), r"2 channels are not 3\^2"),
    # What is of one dimension had a bare ValueError, or computed both where ranks have blocks.
    **{
        type(make()).__name__: (make, r"4 dimensions came, and it takes \(N, C, W\)")
        for make in (
            lambda: nn.Conv1d(2, 2, 3), lambda: nn.ConvTranspose1d(2, 2, 3),
            lambda: nn.MaxPool1d(2), lambda: nn.AvgPool1d(2), lambda: nn.AdaptiveAvgPool1d(2),
        )
    },
    "norm": (lambda: nn.BatchNorm1d(2), "2 channels in 4 dimensions came, and it takes 2 in 2 or"),
}  # fmt: skip
"""Layers that images of 9 x 5 with two channels do not fit."""


@cases("what", UNFIT)
def test_a_layer_says_the_same_on_one_rank_and_on_each_of_four(what: str) -> None:
    make, message = UNFIT[what]

    def refusal(mesh: Mesh) -> str:
        model = Net(make())
        with pytest.raises(UserError, match=message) as raised:
            train(model, mesh, np.zeros((2, 1, 9, 5), np.float32))
        return str(raised.value)

    alone = refusal(serial_mesh())
    assert alone.startswith("middle (") and "\n" not in alone
    assert set(on_threads(lambda: refusal(Mesh(sp_h=2, sp_w=2)), ranks=4)) == {alone}


def test_global_pooling_of_other_dimensions() -> None:
    """It is computed apart where the region ends."""

    def program() -> None:
        model = Net(nn.AdaptiveAvgPool1d(1), spatial={"middle": "samples"})
        with pytest.raises(UserError, match=r"middle \(Adap.*: 4 dimensions came, and it takes"):
            train(model, Mesh(sp_w=2), np.zeros((2, 1, 9, 5), np.float32))

    on_threads(program, ranks=2)


def test_targets_and_losses() -> None:
    def step(model: nn.Module, **options: Any) -> Any:
        return hpcml.parallelize(
            model, optimizer=hpcml.optim.SGD, lr=0.1, mesh=Mesh(sp_w=2), **options
        )

    x, y = np.zeros((2, 1, 5, 6), np.float32), np.zeros(2, np.int64)

    def program() -> None:
        with pytest.raises(UserError, match=r"targets \(2,\) for outputs of pixels"):
            step(Net(nn.ReLU()), loss=nn.CrossEntropyLoss())((x, y))
        for loss in (nn.CrossEntropyLoss(), nn.MSELoss()):
            with pytest.raises(UserError, match=r"^targets of \(5, 7\) for outputs of \(5, 6\): "):
                step(Net(nn.ReLU()), loss=loss)((x, np.zeros((2, 5, 7), np.int64)))
        with pytest.raises(UserError, match="sp_w=2 needs a loss of its own"):
            step(Net(nn.ReLU()))((x, y))
        with pytest.raises(UserError, match=r"must be a tensor of one element, .* not shape"):
            step(Net(nn.ReLU()), loss=lambda a, b: a)((x, x))
        with pytest.raises(
            UserError, match=r'spatial.end="last": no module .* there are conv, mid'
        ):
            step(Net(nn.ReLU()), loss=nn.MSELoss(), spatial_end="last")
        with pytest.raises(UserError, match=r"data_parallel.mode=local with mesh.sp_w=2"):
            step(Net(nn.ReLU()), loss=nn.MSELoss(), mode="local")
        model = Classifier()
        step(model, loss=nn.CrossEntropyLoss())
        with pytest.raises(UserError, match="divided among ranks already"):
            step(model, loss=nn.CrossEntropyLoss())
        made = step(Classifier(), loss=nn.CrossEntropyLoss())
        made.division.grid.begin((37, 42))
        with pytest.raises(
            UserError, match=r"give it this rank's block .* of images of \(37, 42\)"
        ):
            made.model(Tensor(np.zeros((2, 1, 37, 42), np.float32)))

    on_threads(program, ranks=2)
