"""Parameters: first values are a function of (seed, name, index), made late or in any slice."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from hpcml import memory, nn, rng
from hpcml.nn import Constant, Normal, Parameter, Uniform


def made(name: str, seed: int = 0, dtype: str = "float32") -> Parameter:
    parameter = Parameter(shape=(7, 5), init=Normal(0.5, 1.0), dtype=dtype)
    parameter.name = name
    rng.manual_seed(seed)
    return parameter


@pytest.mark.parametrize("init", [Normal(2.0), Uniform(0.3), Constant(4.0)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slices_equal_slices_of_the_whole(init: nn.parameter.Init, dtype: str) -> None:
    parameter = Parameter(shape=(41, 101), init=init, dtype=dtype)
    parameter.name = "weight"
    rng.manual_seed(5)
    whole = parameter.numpy().reshape(-1)
    for start, stop in [(0, 4141), (0, 1), (1, 4), (3, 3), (17, 4001), (4096, 4141), (4140, 4141)]:
        part = np.empty(stop - start, dtype)
        parameter.fill(part, start, 5)
        np.testing.assert_array_equal(part, whole[start:stop])


def test_values_depend_on_seed_and_name_alone() -> None:
    first = made("a").numpy()
    made("other").numpy()
    np.testing.assert_array_equal(made("a").numpy(), first)
    assert not np.array_equal(made("b").numpy(), first)
    assert not np.array_equal(made("a", seed=1).numpy(), first)
    np.testing.assert_allclose(made("a", dtype="float64").numpy(), first, rtol=1e-5, atol=1e-6)


def test_equal_layers_start_differently_and_names_come_from_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).name_parts()
    assert [p.name for p in model.parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not np.array_equal(model[0].weight.numpy(), model[1].weight.numpy())
    anonymous = [nn.Linear(4, 4).weight for _ in range(2)]  # used before a model names them
    assert not np.array_equal(anonymous[0].numpy(), anonymous[1].numpy())
    rng.manual_seed(0)
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).name_parts()
    np.testing.assert_array_equal(again[1].weight.numpy(), model[1].weight.numpy())


def test_values_are_made_when_needed_and_counted() -> None:
    gc.collect()
    before = memory.account().live["params"]
    parameter = Parameter(shape=(1000,), init=Constant(3.0))
    assert not parameter.has_values and parameter.shape == (1000,) and parameter.numel() == 1000
    assert parameter.dtype == np.float32 and parameter.requires_grad and parameter.is_parameter
    assert memory.account().live["params"] == before
    assert (parameter.numpy() == 3).all() and parameter.has_values
    assert memory.account().live["params"] == before + 4000
    parameter.to_dtype("float64")
    gc.collect()
    assert memory.account().live["params"] == before + 8000
    late = Parameter(shape=(3,), init=Constant(0.1))
    late.to_dtype(np.float64)
    assert not late.has_values and late.numpy().dtype == np.float64 and late.numpy()[0] == 0.1


def test_given_values() -> None:
    array = np.ones((2, 3))
    parameter = Parameter(array, requires_grad=False)
    assert parameter.data is array and not parameter.requires_grad and parameter.dtype == np.float64
    assert Parameter([1.0, 2.0]).dtype == np.float32
    assert parameter.layout == {}
    parameter.data = np.zeros(4, np.float32)
    assert parameter.shape == (4,) and parameter.dtype == np.float32
    with pytest.raises(ValueError, match="either data, or a shape"):
        Parameter()
    with pytest.raises(ValueError, match="either data, or a shape"):
        Parameter(array, shape=(2, 3))
    with pytest.raises(ValueError, match=r"\(2, -1\)"):
        Parameter(shape=(2, -1))
