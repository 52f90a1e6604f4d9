"""Streams wait for each other where they must (`standin.order`): in training, message by message.

The programs below are right as they are; without their waits they fail, as is shown for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpcml.comm import Mesh, mailbox, staging
from hpcml.comm.direct import VARIABLE
from hpcml.comm.faults import Synchronous
from hpcml.comm.threads import run
from tests.device import emulator, test_training
from tests.device.standin import order, streams

LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"mesh": {"dp": 2}, "zero": 0},
    "ZeRO 2": {"mesh": {"dp": 2}, "zero": 2},
    "ZeRO 3": {"mesh": {"dp": 2}, "zero": 3},
    "tp": {"mesh": {"tp": 2}, "sequence_parallel": True},
    "cp": {"mesh": {"cp": 2}},
    "pp": {"mesh": {"pp": 2}, "schedule": "1f1b"},
}


@pytest.fixture(autouse=True)
def upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each kernel once: that the order of its threads is none is shown by its own tests."""
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))


@pytest.mark.usefixtures("watch")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_in_the_background(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "device")
    found = test_training.trained("cuda", "float64", 2, overlap=True, **LAYOUTS[layout])
    test_training.same(found, "float64", 1e-10)


@pytest.mark.usefixtures("watch")
def test_steps_with_divided_images() -> None:
    test_training.of_images("cuda", "float64", 2, sp_h=2)


def early(device: Any) -> None:
    """A message is sent before the other rank asks for it, from memory that was just written."""
    axis = Mesh()["dp"]
    if axis.rank == 0:
        sent = axis.isend(device.ones(5) * 2, 1)
        axis.barrier()
        sent.wait()
    else:
        axis.barrier()
        out = device.empty(5)
        axis.recv(out, 0)
        assert (out + 1).tolist() == [3] * 5


def awaited(device: Any) -> None:
    """A message comes into memory that was just read, from a rank that sends it later."""
    axis = Mesh()["dp"]
    if axis.rank == 0:
        x = device.full(5, 3.0)
        axis.barrier()
        axis.isend(x, 1).wait()
    else:
        out = device.ones(5)
        before = out * 2
        coming = axis.irecv(out, 0)
        axis.barrier()
        coming.wait()
        assert (out + before).tolist() == [5] * 5


def background(device: Any) -> None:
    """A sum, of what was just written, is made by another thread and read by this one."""
    axis = Mesh()["dp"]
    x, out = device.ones(5) * (axis.rank + 1), device.empty(5)
    axis.iallreduce(x, out=out).wait()
    assert (out + 1).tolist() == [4] * 5


PROGRAMS = early, awaited, background


def started(program: Callable[[Any], None], device: Any, kept: bool) -> None:
    """Run it on two threads, which keep what is sent until it is asked for or do not."""
    run(program, device, ranks=2, faults=[] if kept else [Synchronous()], timeout=30)


@pytest.mark.usefixtures("watch")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("way", ["device", "staged"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_message(
    program: Any, way: str, kept: bool, standing_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, way)
    started(program, standing_in, kept)


@pytest.mark.parametrize(
    ("program", "way", "kept", "where", "wait"),
    [
        (early, "device", False, staging, "wait_for_device"),
        (awaited, "device", True, staging, "wait_for_device"),
        (early, "device", True, mailbox, "_settled"),
        (awaited, "device", True, mailbox, "_settled"),
        (early, "staged", True, streams.Event, "record"),
        (early, "staged", True, streams.Event, "synchronize"),
        (early, "staged", True, staging, "wait_for_device"),
        (background, "device", True, streams.Event, "record"),
        (background, "device", True, streams.Stream, "wait_event"),
        (background, "device", True, staging, "wait_for_device"),
    ],
)
def test_without_a_wait_it_fails(
    program: Any, way: str, kept: bool, where: Any, wait: str, standing_in: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLE, way)
    monkeypatch.setattr(where, wait, lambda *_: None)
    with order.watched(), pytest.raises(AssertionError):
        started(program, standing_in, kept)


def test_memory_is_not_given_back_while_another_stream_uses_it(standing_in: Any) -> None:
    """It may be somebody else's at once, whose work comes after that of its own stream only."""
    for waits in (True, False):
        with order.watched() as found:
            x, stream = standing_in.ones(5), standing_in.cuda.Stream()
            stream.wait_event(standing_in.cuda.get_current_stream().record())
            with stream:
                y = x + 1
            if waits:
                stream.synchronize()
            del x
            assert len(found.races) == (not waits)
            del y
