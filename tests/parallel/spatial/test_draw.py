"""The picture shows the pixels that a rank gets from others."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from hpcml import nn
from hpcml.comm import Mesh, run
from hpcml.parallel.spatial import divide
from hpcml.parallel.spatial.draw import svg
from hpcml.parallel.spatial.windows import windows_of


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 2), (3, 1, 0)])
def test_dots_are_the_ghosts_of_the_plan(kernel: int, stride: int, padding: int) -> None:
    sizes = 9, 14

    def program() -> int:
        layer = nn.Conv2d(1, 1, kernel, stride, padding)
        grid = divide(nn.Sequential(layer), nn.MSELoss(), Mesh(sp_h=2, sp_w=3)).grid
        grid.begin(sizes)
        return windows_of(layer, grid, sizes).exchange.ghosts

    for rank, ghosts in enumerate(run(program, ranks=6)):
        layer = nn.Conv2d(1, 1, kernel, stride, padding)
        picture = ET.fromstring(svg(layer, sizes, (2, 3), divmod(rank, 3)))
        dots = picture.findall("{http://www.w3.org/2000/svg}circle")
        cut_off = stride > 1  # there a rank may also get what lies beside pixels it does not read
        assert len(dots) == ghosts or (cut_off and len(dots) <= ghosts)
