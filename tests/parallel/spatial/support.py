"""Layers and models that the tests of spatial parallelism share, and runs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import nn, rng
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.parallel.spatial import Grid, divide

Array = np.ndarray[Any, Any]


def normal(*shape: int, salt: int = 0) -> Array:
    return np.random.default_rng([*shape, salt]).standard_normal(shape)


class Around(nn.Module):
    """A layer between element-wise ones, so that something else saves what it gets."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Tanh(), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.before(x))


def parameters_of(model: nn.Module) -> dict[str, Array]:
    """Gradients by name."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.numpy()
    return found


def passed(model: nn.Module, x: Array, weigh: Callable[[tuple[int, ...]], Array]) -> Any:
    """Output, gradient of the input and of parameters, and what a module keeps beside these."""
    given = Tensor(np.ascontiguousarray(x), True)
    with rng.samples(1, 10):
        out = model(given)
        out.backward(np.ascontiguousarray(weigh(out.shape)))
    assert given.grad is not None
    kept = {name: one.numpy().copy() for name, one in model.named_buffers()}
    return out.numpy(), given.grad.numpy(), parameters_of(model), kept


def compare_layer(
    make: Callable[[], nn.Module],
    mesh: Mesh,
    shape: tuple[int, ...],
    tolerance: float = 1e-12,
    overlap: bool = False,
) -> Grid:
    """A layer on this rank's blocks, beside the same layer of the whole."""
    x = normal(*shape)
    model = Around(make()).to(np.float64).name_parts()
    whole: dict[str, Array] = {}

    def weigh(shape: tuple[int, ...]) -> Array:
        whole["g"] = normal(*shape, salt=1)
        return whole["g"]

    expected = passed(model, x, weigh)
    other = Around(make()).to(np.float64).name_parts()
    division = divide(other, nn.MSELoss(), mesh, overlap=overlap)
    grid, sizes = division.grid, x.shape[2:]
    (block,) = division.inputs([x])
    found = passed(other, block, lambda _: grid.cut(whole["g"], whole["g"].shape[2:]))
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(found[0], grid.cut(expected[0], expected[0].shape[2:]), **close)
    np.testing.assert_allclose(found[1], grid.cut(expected[1], sizes), **close)
    for name, gradient in found[2].items():
        total = grid.axis.allreduce(np.ascontiguousarray(gradient))
        np.testing.assert_allclose(total, expected[2][name], rtol=1e-11, atol=1e-11, err_msg=name)
    for name, values in found[3].items():
        np.testing.assert_allclose(values, expected[3][name], 1e-6, 1e-6, err_msg=name)
    return grid
