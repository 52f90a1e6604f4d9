"""A GPU for the tests of this folder: a stand-in, or with HPCML_GPU=1 that of the machine."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.device import emulator, standin
from tests.device.standin import order
from tests.device.support import DTYPES, Numbers


@pytest.fixture
def standing_in() -> Iterator[Any]:
    """A module like CuPy whose arrays lie on the host, whose kernels run there."""
    if os.environ.get("HPCML_GPU") == "1":
        pytest.skip("on the stand-in alone: shows nothing of a GPU")
    if reason := emulator.missing():
        pytest.skip(reason)
    standin.used.clear()
    with standin.installed() as module:
        yield module


@pytest.fixture
def watch(device: Any) -> Iterator[None]:
    """On the stand-in, fail where a stream uses what it has not waited for (`standin.order`)."""
    with order.watched() as found:
        yield
    assert not found.races


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """The stand-in, or CuPy where the tests shall run on a GPU (scripts/gpu_check.sh)."""
    if os.environ.get("HPCML_GPU") == "1":
        return importlib.import_module("cupy")  # a test that shows nothing must not pass for one
    return request.getfixturevalue("standing_in")


@pytest.fixture(params=DTYPES)
def numbers(request: pytest.FixtureRequest, device: Any) -> Numbers:
    """Numbers of each type of elements."""
    return Numbers(device, request.param)


@pytest.fixture
def cuda(device: Any) -> Any:
    """The kernels."""
    from hpcml.kernels import cuda

    return cuda
