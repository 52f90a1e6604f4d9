"""Chunks of linear layers travel beside their products, and never outlive an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml import Tensor, memory
from hpcml.autograd.ops import linear as products
from hpcml.comm import Axis, Mesh, run
from hpcml.comm.request import Request
from hpcml.parallel.tensor.overlap import CHUNKS, gathered_linear, scattered_linear
from tests.parallel.chunked import (
    IN,
    OUT,
    arrays,
    axis_of_all,
    forward,
    normal,
    uneven,
)
from tests.ranks import OnRanks, on_ranks_of

cases = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("rings")
on_ranks = on_ranks_of(axis_of_all)
EVENTS = {  # G: a gather is started, S: a scatter; P, W, B: products, sums. *: while one goes on
    "gathered": ("G G P* G P* P", "P S P* S P* S W* B*"),
    "scattered": ("P S P* S P* S", "G G P* G P* P W"),
}


class Watched(Request):
    """A request that is on the list of a rank until somebody waits for it."""

    def __init__(self, request: Request, on_way: list[Watched]) -> None:
        self.request, self.on_way = request, on_way
        on_way.append(self)

    def wait(self) -> Any:
        if self in self.on_way:
            self.on_way.remove(self)
        return self.request.wait()

    def test(self) -> bool:
        return self.request.test()


class Record(threading.local):
    """What happens on this rank."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.on_way: list[Watched] = []
        self.started: list[Watched] = []

    def watch(self, axis: Axis) -> None:
        for letter, name in (("G", "iallgather"), ("S", "ireduce_scatter")):
            setattr(axis, name, self._starting(letter, getattr(axis, name)))

    def _starting(self, letter: str, start: Callable[..., Request]) -> Callable[..., Request]:
        def started(*args: Any, **options: Any) -> Request:
            self.events.append(letter)
            self.started.append(Watched(start(*args, **options), self.on_way))
            return self.started[-1]

        return started

    def product(self, letter: str, compute: Callable[..., None]) -> Callable[..., None]:
        """Does not end before what is on its way is there: nobody can be waiting for it."""

        def watched(*args: Any) -> None:
            self.events.append(letter + "*" * bool(self.on_way))
            patience = time.monotonic() + 60
            while not all(request.test() for request in self.on_way):
                assert time.monotonic() < patience, "it does not come while a product runs"
                time.sleep(1e-4)
            compute(*args)

        return watched


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    found = Record()
    names = {"product": "P", "input_gradient": "P", "weight_gradient": "W", "bias_gradient": "B"}
    for name, letter in names.items():
        monkeypatch.setattr(products, name, found.product(letter, getattr(products, name)))
    return found


@cases("layer", list(EVENTS))
def test_chunks_travel_while_products_run(on_ranks: OnRanks, layer: str, record: Record) -> None:
    def program(axis: Axis) -> None:
        counts = uneven(axis)
        given = arrays(layer, (3,), axis, counts, normal)
        record.watch(axis)
        x, weight = Tensor(given.x, True), Tensor(given.weight, True)
        bias = None if given.bias is None else Tensor(given.bias, True)
        out = forward(layer, True, x, weight, bias, axis, counts)
        happened, record.events = record.events, []
        out.backward(given.g)
        assert (" ".join(happened), " ".join(record.events)) == EVENTS[layer]
        assert not record.on_way

    on_ranks(program)


@cases("layer", list(EVENTS))
def test_after_an_error_nothing_is_on_its_way(
    on_ranks: OnRanks, layer: str, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        record.events.append("P")
        if record.events.count("P") == 2:
            raise RuntimeError("broken")

    monkeypatch.setattr(products, "product", fails)

    def program(axis: Axis) -> None:
        counts = uneven(axis)
        given = arrays(layer, (5,), axis, counts, normal)
        record.watch(axis)
        with pytest.raises(RuntimeError, match="broken"):
            forward(layer, True, Tensor(given.x), Tensor(given.weight), None, axis, counts)
        assert not record.on_way  # somebody has waited for each
        assert record.started
        assert all(request.test() for request in record.started)
        assert axis.iallreduce(np.ones(1)).wait() == axis.size

    on_ranks(program)


def test_an_error_of_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, local = products.product, threading.local()

    def fails(*args: Any) -> None:
        if getattr(local, "breaks", False):
            raise RuntimeError("broken")
        compute(*args)

    monkeypatch.setattr(products, "product", fails)

    def program() -> None:
        axis = Mesh({"tp": 3})["tp"]
        local.breaks = axis.rank == 1
        x, weight = Tensor(np.ones((4, 2, IN))), Tensor(np.ones((OUT, IN)))
        gathered_linear(x, weight, None, axis, [2, 2, 2])

    with pytest.raises(RuntimeError, match="broken"):
        run(program, ranks=3, timeout=30)


def test_what_travels_takes_the_memory_of_few_chunks() -> None:
    """Two chunks that come; or one that goes, one that follows, before and after it is in order."""

    def program() -> None:
        axis, account = Mesh({"tp": 2})["tp"], memory.account()
        batch, counts, width = 4 * CHUNKS, [100, 100], 8
        weight = Tensor(np.ones((width, width)), True)
        whole = batch * sum(counts) * width * 8

        def peak(call: Callable[[], Any]) -> float:
            account.reset_peak()
            before = account.live["buffers"]
            call()
            assert account.live["buffers"] == before
            return (account.peak["buffers"] - before) / whole * CHUNKS

        x = Tensor(np.ones((batch, counts[axis.rank], width)), True)
        out = gathered_linear(x, weight, None, axis, counts)
        assert peak(lambda: gathered_linear(x, weight, None, axis, counts)) == 2
        assert 2 <= peak(lambda: out.backward(np.ones(out.shape))) <= 4
        given = Tensor(np.ones(out.shape), True)
        out = scattered_linear(given, weight, axis, counts)
        assert 2 <= peak(lambda: scattered_linear(given, weight, axis, counts)) <= 4
        assert peak(lambda: out.backward(np.ones(out.shape))) == 2

    run(program, ranks=2)
