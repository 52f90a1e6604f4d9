"""Arrays that are not NumPy's: CuPy by a stand-in, DLPack by NumPy's and PyTorch's own."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Axis
from hpcml.comm.staging import stage


class FakeCupyArray:
    """What of `cupy.ndarray` the staging relies on; the memory cannot be read as NumPy's."""

    def __init__(self, values: np.ndarray) -> None:
        self.memory = values.copy()
        self.shape, self.dtype = values.shape, values.dtype
        self.device = contextlib.nullcontext()

    def set(self, host: np.ndarray) -> None:
        assert host.flags.c_contiguous
        self.memory[...] = host


FakeCupyArray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module named cupy with the few functions that the staging calls."""
    calls: list[str] = []
    stream = types.SimpleNamespace(synchronize=lambda: calls.append("synchronize"))

    def asnumpy(x: FakeCupyArray) -> np.ndarray:
        calls.append("asnumpy")
        return x.memory.copy(order="C")

    fake = types.SimpleNamespace(
        calls=calls,
        asnumpy=asnumpy,
        asarray=FakeCupyArray,
        from_dlpack=lambda x: x.array,
        cuda=types.SimpleNamespace(get_current_stream=lambda: stream),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    return fake


def test_device_arrays_go_by_way_of_the_host(axis: Axis, cupy: types.SimpleNamespace) -> None:
    x = FakeCupyArray(np.arange(6, dtype=np.float32).reshape(2, 3))
    result = axis.allreduce(x)
    assert isinstance(result, FakeCupyArray)
    np.testing.assert_array_equal(result.memory, axis.size * x.memory)
    out = FakeCupyArray(np.zeros((2 * axis.size, 3), np.float32))
    assert axis.allgather(x, out=out) is out
    np.testing.assert_array_equal(out.memory, np.concatenate([x.memory] * axis.size))
    assert cupy.calls == ["asnumpy", "asnumpy", "synchronize"]


def test_device_arrays_in_place(axis: Axis, cupy: types.SimpleNamespace) -> None:
    x = FakeCupyArray(np.full(5, 1.5, np.float16))
    assert axis.allreduce(x, out=x) is x
    assert x.memory.tolist() == [1.5 * axis.size] * 5
    axis.send(x, axis.rank)
    received = FakeCupyArray(np.zeros(5, np.float16))
    assert axis.recv(received, axis.rank) is received
    assert received.memory.tolist() == x.memory.tolist()


def test_device_memory_of_another_library(axis: Axis, cupy: types.SimpleNamespace) -> None:
    class OnDevice:
        array = FakeCupyArray(np.ones(3))

        def __dlpack__(self) -> None:
            raise AssertionError("NumPy cannot take device memory")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    result = axis.allreduce(OnDevice())
    assert isinstance(result, FakeCupyArray) and result.memory.tolist() == [axis.size] * 3


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
    assert np.shares_memory(stage(x).host, x.values)
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
