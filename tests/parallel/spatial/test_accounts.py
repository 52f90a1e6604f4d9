"""What spatial parallelism sends and keeps, beside what the geometry of the layers says."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

from hpcml import memory, nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.nn.part import blocks
from hpcml.parallel.spatial import divide
from tests.parallel.cases import name_of, ranks_of
from tests.parallel.spatial.support import normal

cases = pytest.mark.parametrize

# kernel, stride, padding, dilation
CONVOLUTIONS = [(3, 1, 1, 1), (7, 2, 3, 1), (3, 1, 2, 2), (5, 1, 0, 1), (1, 2, 0, 1), (1, 1, 0, 1)]
N, C = 2, 3
SIZES = 15, 18


def needed(n: int, ranks: int, rank: int, how: tuple[int, ...]) -> list[set[int]]:
    """Places of a line that a rank reads, and those that it has."""
    k, s, p, d = how
    outputs = blocks((n + 2 * p - (k - 1) * d - 1) // s + 1, ranks)[rank]
    read = {o * s - p + tap * d for o in range(*outputs) for tap in (0, k - 1)}
    every = set(range(min(read), max(read) + 1)) & set(range(n))
    return [every, set(range(*blocks(n, ranks)[rank]))]


@cases("grid", [{"sp_w": 2}, {"sp_h": 3}, {"sp_h": 2, "sp_w": 2}], ids=name_of)
@cases("how", CONVOLUTIONS, ids=str)
def test_bytes_of_a_convolution(how: tuple[int, ...], grid: dict[str, int]) -> None:
    """Forward each rank gets what it reads and others have; backward the same goes back."""

    def program() -> None:
        mesh = Mesh(**grid)
        k, s, p, d = how
        model = nn.Sequential(nn.Conv2d(C, 2, k, s, p, d)).to(np.float64).name_parts()
        division = divide(model, nn.MSELoss(), mesh)
        axis = division.grid.axis
        (block,) = division.inputs([normal(N, C, *SIZES)])
        x = Tensor(block, True)
        ranks = [mesh[name].size for name in ("sp_h", "sp_w")]
        places = [mesh[name].rank for name in ("sp_h", "sp_w")]
        lines = [needed(*line, how) for line in zip(SIZES, ranks, places, strict=True)]
        # A rank that reads less than it has along one dim still gets ghosts beside what it has.
        ghosts = prod(len(read | own) for read, own in lines) - prod(len(own) for _, own in lines)
        out = model(x)  # the first call also tells sizes
        before = mesh.ledger.snapshot()
        out = model(x)
        sent = (mesh.ledger.snapshot() - before).get(axis.name, {})
        moved = sent["halo"].bytes if "halo" in sent else 0
        assert moved == 8 * N * C * ghosts
        assert set(sent) <= {"halo"}, "sizes are told once"
        before = mesh.ledger.snapshot()
        out.backward(np.ones(out.shape))
        back = (mesh.ledger.snapshot() - before).get(axis.name, {})
        total = axis.allreduce(np.array([moved, back["halo"].bytes if "halo" in back else 0]))
        assert total[0] == total[1] and set(back) <= {"halo"}

    on_threads(program, ranks=ranks_of(grid))


class Stack(nn.Module):
    """Convolutions and activations; what the latter save is what the former read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.rest = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def kept(model: nn.Module, x: Any) -> int:
    """Bytes of activations that a forward pass leaves for backward."""
    before = memory.account().live["activations"]
    out = model(Tensor(x))
    held = memory.account().live["activations"] - before - out.data.nbytes
    out.backward(np.zeros(out.shape, np.float32))
    return held


@cases("grid", [{"sp_w": 2}, {"sp_h": 2, "sp_w": 2}, {"sp_w": 4}], ids=name_of)
def test_activations_are_divided(grid: dict[str, int]) -> None:
    """A rank keeps its block of each, and the rims that its convolutions have read."""
    x = normal(1, 1, 32, 64).astype(np.float32)

    def program() -> None:
        whole = kept(Stack().name_parts(), x)
        mesh = Mesh(**grid)
        model = Stack().name_parts()
        division = divide(model, nn.MSELoss(), mesh)
        (block,) = division.inputs([x])
        h, w = block.shape[2:]
        extent = [
            n + (axis.rank > 0) + (axis.rank < axis.size - 1)
            for n, axis in zip((h, w), division.grid.axes(2), strict=True)
        ]
        rim = prod(extent) - h * w
        assert kept(model, block) == whole // division.grid.axis.size + 4 * rim * (1 + 4 * 8)

    on_threads(program, ranks=ranks_of(grid))
