"""Arrays that are not NumPy's: CuPy by a stand-in, DLPack by NumPy's and PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Axis
from hpcml.comm.staging import as_array
from tests.device import standin


@pytest.fixture
def cupy() -> Iterator[Any]:
    """A module like CuPy whose arrays cannot be read as NumPy's."""
    with standin.installed() as module:
        yield module


def test_device_arrays_go_by_way_of_the_host(axis: Axis, cupy: Any) -> None:
    before = standin.syncs()
    x = cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    result = axis.allreduce(x)
    assert isinstance(result, cupy.ndarray)
    np.testing.assert_array_equal(result.memory, axis.size * x.memory)
    out = cupy.zeros((2 * axis.size, 3), np.float32)
    assert axis.allgather(x, out=out) is out
    np.testing.assert_array_equal(out.memory, np.concatenate([x.memory] * axis.size))
    assert standin.syncs() == before or axis.size > 1


def test_device_arrays_in_place(axis: Axis, cupy: Any) -> None:
    x = cupy.full(5, 1.5, np.float16)
    assert axis.allreduce(x, out=x) is x
    assert x.tolist() == [1.5 * axis.size] * 5
    axis.send(x, axis.rank)
    received = cupy.zeros(5, np.float16)
    assert axis.recv(received, axis.rank) is received
    assert received.tolist() == x.tolist()


@pytest.mark.parametrize("op", ["sum", "max"])
def test_what_a_device_array_has_is_added_to(op: str, axis: Axis, cupy: Any) -> None:
    x, out = cupy.ones(4 * axis.size), cupy.full(4, 10.0)
    axis.reduce_scatter(x, op, out=out, accumulate=True)
    assert out.tolist() == [10.0 + axis.size if op == "sum" else 10.0] * 4
    out = cupy.full(4 * axis.size, 10.0)
    axis.allreduce(x, op, out=out, accumulate=True)
    assert out.tolist() == [10.0 + axis.size if op == "sum" else 10.0] * (4 * axis.size)


def test_device_memory_of_another_library(axis: Axis, cupy: Any) -> None:
    class OnDevice:
        def __dlpack__(self) -> None:
            raise AssertionError("NumPy cannot take device memory")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    cupy.from_dlpack = lambda x: cupy.ones(3)
    result = axis.allreduce(OnDevice())
    assert isinstance(result, cupy.ndarray) and result.tolist() == [axis.size] * 3


class Exporter:
    """Somebody's array on the host: nothing but DLPack."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def test_dlpack_on_the_host_is_used_where_it_lies(axis: Axis) -> None:
    x = Exporter(np.arange(4.0))
    assert np.shares_memory(as_array(x), x.values)
    assert axis.allreduce(x).tolist() == [0, axis.size, 2 * axis.size, 3 * axis.size]
    out = Exporter(np.zeros(4))
    assert axis.allreduce(x, out=out) is out
    assert out.values.tolist() == [0, axis.size, 2 * axis.size, 3 * axis.size]
    assert axis.allreduce(x, out=x) is x
    assert x.values.tolist() == out.values.tolist()


@pytest.mark.filterwarnings("default")  # whatever PyTorch has to say while it is imported
def test_torch_tensors(axis: Axis) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(4)
    assert axis.allreduce(x, out=x) is x
    assert x.tolist() == [axis.size] * 4
    with pytest.raises(ValueError, match=r"DLPack cannot hand this Tensor to NumPy .* ml_dtypes"):
        axis.allreduce(x.bfloat16())
