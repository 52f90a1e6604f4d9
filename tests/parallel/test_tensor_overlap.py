"""Linear layers that communicate in chunks beside their products: as without, and really beside."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import hpcml
from hpcml import Tensor, collectives, kernels, memory
from hpcml.autograd.ops import linear as products
from hpcml.comm import Axis, Mesh, run
from hpcml.comm.choice import VARIABLE
from hpcml.comm.request import Request
from hpcml.models import GPT, NextTokenLoss
from hpcml.nn import functional as F
from hpcml.parallel.tensor import Positions
from hpcml.parallel.tensor.overlap import CHUNKS, gathered_linear, scattered_linear
from tests.parallel.cases import serial_mesh, values

OnRanks = Callable[..., None]
cases = pytest.mark.parametrize
IN, OUT = 5, 3
BATCHES: list[tuple[int, ...]] = [(), (1,), (2,), (5,), (2, 3), (0,)]
LAYERS = ("gathered", "gathered without bias", "scattered")


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Algorithms whose volume does not depend on the size of the message."""
    chosen = {"allgather": "ring", "reduce_scatter": "pairwise"}
    rows = [f'{operation} = [[inf, "{name}"]]' for operation, name in chosen.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:  # of this rank alone
        file.write("\n".join("\n".join([f"[node.{ranks}]", *rows]) for ranks in (2, 3, 4)))
        file.flush()
        monkeypatch.setenv(VARIABLE, file.name)
        yield


@pytest.fixture(params=[1, 2, 3, 4, pytest.param("mpi", marks=pytest.mark.mpi)])
def on_ranks(request: pytest.FixtureRequest, rings: None) -> OnRanks:
    """Run `program(axis, *arguments)` on so many threads, or on the ranks of mpiexec."""

    def start(program: Callable[..., None], *arguments: Any, deterministic: bool = False) -> None:
        def here() -> None:
            mesh = Mesh({"tp": Mesh().size}, deterministic=deterministic)
            program(mesh["tp"], *arguments)

        if request.param == "mpi":
            here()
        else:
            run(here, ranks=request.param)

    return start


def uneven(axis: Axis) -> list[int]:
    """Positions of each rank: 1, 2, 0, 1."""
    return [(rank + 1) % 3 for rank in range(axis.size)]


class Arrays(NamedTuple):
    """What a rank puts in: operands, and the gradient of the result."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    g: np.ndarray


def arrays(
    layer: str, batch: tuple[int, ...], axis: Axis, counts: Sequence[int],
    make: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], n: int = IN, m: int = OUT,
) -> Arrays:  # fmt: skip
    random = np.random.default_rng([len(batch), axis.rank])
    own, whole = (*batch, counts[axis.rank]), (*batch, sum(counts))
    before, after = (own, whole) if layer.startswith("gathered") else (whole, own)
    return Arrays(
        make(random, (*before, n)), make(random, (m, n)),
        make(random, (m,)) if layer == "gathered" else None, make(random, (*after, m)),
    )  # fmt: skip


def whole_numbers(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of products of them are exact in any order."""
    return random.integers(-9, 10, shape).astype(np.float64)


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


Needs = tuple[bool, bool, bool]


def forward(
    layer: str, chunks: bool, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis,
    counts: Sequence[int],
) -> Tensor:  # fmt: skip
    if layer == "scattered":
        if chunks:
            return scattered_linear(x, weight, axis, counts)
        return collectives.reduce_scatter(F.linear(x, weight), axis, -2, counts=counts)
    if chunks:
        return gathered_linear(x, weight, bias, axis, counts)
    return F.linear(collectives.all_gather(x, axis, -2, to="R", counts=counts), weight, bias)


def results(
    layer: str, chunks: bool, given: Arrays, axis: Axis, counts: Sequence[int],
    needs: Needs = (True, True, True),
) -> tuple[list[Any], dict[str, tuple[int, ...]]]:  # fmt: skip
    """The result and the gradients of x, weight and bias, and what was sent: bytes, on the wire."""
    before = axis.ledger.snapshot()
    x, weight = Tensor(given.x * 1, needs[0]), Tensor(given.weight, needs[1])
    bias = None if given.bias is None else Tensor(given.bias, needs[2])
    out = forward(layer, chunks, x * 1, weight, bias, axis, counts)
    if out.requires_grad:
        out.backward(given.g)
    counted = (axis.ledger.snapshot() - before).get("tp", {})
    sent = {name: (count.bytes, count.bytes_sent) for name, count in counted.items()}
    leaves = (x, weight) if bias is None else (x, weight, bias)
    return [out.data, *(leaf.gradient for leaf in leaves)], sent


@cases("layer", LAYERS)
def test_results_gradients_and_bytes_are_those_without_chunks(
    on_ranks: OnRanks, layer: str
) -> None:
    def program(axis: Axis) -> None:
        for batch in BATCHES:
            for counts in (uneven(axis), [2] * axis.size, [0] * axis.size):
                given = arrays(layer, batch, axis, counts, whole_numbers)
                found, sent = results(layer, True, given, axis, counts)
                expected, of_one = results(layer, False, given, axis, counts)
                for mine, theirs in zip(found, expected, strict=True):
                    assert mine.dtype == theirs.dtype
                    np.testing.assert_array_equal(mine, theirs)
                assert sent == of_one

    on_ranks(program)


@cases(
    ("kind", "tolerance"),
    [(np.float32, 2e-6), (np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2), ("products", 2e-2)],
)
@cases("layer", ["gathered", "scattered"])
def test_other_types(
    on_ranks: OnRanks, layer: str, kind: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bits travel as such; also where there are products of bfloat16 ("products")."""
    multiplied: set[Any] = set()
    if kind == "products":
        kind, compute = ml_dtypes.bfloat16, products.product
        monkeypatch.setattr(kernels, "multiplies", lambda dtype: dtype == kind)

        def product(x: np.ndarray, *others: Any) -> None:
            multiplied.add(x.dtype.name)
            compute(x, *others)

        monkeypatch.setattr(products, "product", product)

    def program(axis: Axis) -> None:
        counts = uneven(axis)
        exact = arrays(layer, (5,), axis, counts, normal)
        given = Arrays(*(array if array is None else array.astype(kind) for array in exact))
        found, sent = results(layer, True, given, axis, counts)
        rounded = Arrays(*(a if a is None else a.astype(np.float64) for a in given))
        expected, of_doubles = results(layer, False, rounded, axis, counts)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == kind
            scale = np.abs(theirs).max(initial=1)
            np.testing.assert_allclose(mine.astype(float), theirs, 0, tolerance * scale)
        share = 8 // given.x.itemsize
        payload = {name: payload // share for name, (payload, _) in of_doubles.items()}
        assert {name: payload for name, (payload, _) in sent.items()} == payload

    on_ranks(program)
    assert multiplied <= {"bfloat16", "float64"}


@cases("layer", ["gathered", "scattered"])
def test_adjoint(on_ranks: OnRanks, layer: str) -> None:
    """<F x, y> = <x, F* y> over all ranks, and likewise for the weight."""

    def program(axis: Axis) -> None:
        counts = uneven(axis)
        given = arrays(layer, (5,), axis, counts, whole_numbers)._replace(bias=None)
        (out, x, weight), _ = results(layer, True, given, axis, counts)

        def inner(a: np.ndarray, b: np.ndarray) -> float:
            return float(axis.allreduce(np.array([(a * b).sum()]))[0])

        assert inner(out, given.g) == inner(given.x, x) == inner(given.weight, weight)

    on_ranks(program)


@cases("layer", ["gathered", "scattered"])
@cases("needs", [(x, w, b) for x in (True, False) for w in (True, False) for b in (True, False)])
def test_only_what_is_needed_is_computed_and_sent(
    on_ranks: OnRanks, layer: str, needs: Needs
) -> None:
    """A frozen weight or bias, an x that is data."""

    def program(axis: Axis) -> None:
        counts = uneven(axis)
        given = arrays(layer, (3,), axis, counts, whole_numbers)
        found, sent = results(layer, True, given, axis, counts, needs)
        expected, of_one = results(layer, False, given, axis, counts, needs)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            np.testing.assert_array_equal(mine, theirs)
        assert sent == of_one

    on_ranks(program)


@cases("layer", ["gathered", "scattered"])
def test_the_same_additions_in_deterministic_mode(on_ranks: OnRanks, layer: str) -> None:
    """Products of one term with powers of two are exact, so that bits tell the order of sums."""

    def program(axis: Axis) -> None:
        counts = uneven(axis)
        given = arrays(layer, (5,), axis, counts, normal, n=1, m=1)
        given = given._replace(weight=np.full((1, 1), 2.0**axis.rank))
        found, expected = (results(layer, how, given, axis, counts)[0] for how in (True, False))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.tobytes() == theirs.tobytes()

    on_ranks(program, deterministic=True)


def test_sizes_that_do_not_fit() -> None:
    axis, weight = Axis("tp"), Tensor(np.ones((OUT, IN)))
    with pytest.raises(ValueError, match=r"counts=\[3\] take 3 along dim 0 of rank 0"):
        gathered_linear(Tensor(np.ones((2, IN))), weight, None, axis, [3])
    with pytest.raises(ValueError, match=r"scattered_linear: dim=-2 of shape \(5,\)"):
        scattered_linear(Tensor(np.ones(IN)), weight, axis, [3])
    with pytest.raises(ValueError, match="the last size of x must be the second"):
        gathered_linear(Tensor(np.ones((2, IN + 1))), weight, None, axis, [2])
    with pytest.raises(TypeError, match="convert them to one type"):
        scattered_linear(Tensor(np.ones((2, IN), np.float32)), weight, axis, [2])


# --- beside the products ------------------------------------------------------------------------

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


# --- whole models -------------------------------------------------------------------------------


def test_where_it_gains() -> None:
    """By default where the axis spans several nodes, and never where nothing is divided."""

    def program() -> list[bool]:
        axis = Mesh({"tp": 2})["tp"]
        ways = [(True, None), (True, True), (True, False), (False, None), (False, True)]
        return [Positions(axis, sequence_parallel=sp, overlap=how).overlaps for sp, how in ways]

    assert run(program, ranks=2) == [[False, True, False, False, False]] * 2
    assert run(program, ranks=2, nodes=[0, 1]) == [[True, True, False, False, False]] * 2
    alone = Positions(Axis("tp"), sequence_parallel=True, overlap=True)
    assert not alone.overlaps


def trained(mesh: Mesh, **options: Any) -> tuple[list[float], dict[str, np.ndarray], Any]:
    """Losses, parameters and what a step sends along tp, of a small GPT."""
    model = GPT(11, 7, layers=2, heads=12, width=24, dropout=0.1).to(np.float64)
    step = hpcml.parallelize(
        model, loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW, lr=1e-2, mesh=mesh, seed=3,
        grad_clip=0.3, microbatch=3, **options,
    )  # fmt: skip
    losses = []
    for number in range(3):
        before = mesh.ledger.snapshot()
        tokens = np.random.default_rng(number).integers(0, 11, (2, 5, 7))
        losses.append(step((tokens[0], tokens[1])))
    return losses, values(step), (mesh.ledger.snapshot() - before).get("tp", {})


@cache
def reference() -> tuple[list[float], dict[str, np.ndarray], Any]:
    return trained(serial_mesh())


def test_a_whole_model_trains_as_on_one_rank(on_ranks: OnRanks) -> None:
    def program(axis: Axis) -> None:
        mesh = Mesh({"tp": axis.size})
        losses, parameters, sent = trained(mesh, sequence_parallel=True, overlap=True)
        np.testing.assert_allclose(losses, reference()[0], rtol=1e-12)
        for name, array in reference()[1].items():
            np.testing.assert_allclose(parameters[name], array, rtol=0, atol=1e-12, err_msg=name)
        if axis.size > 1:
            *_, plain = trained(mesh, sequence_parallel=True, overlap=False)
            more = (4 * 2 + 1) * (2 + 1)  # layers; microbatches of 3 and 2 samples
            for name in ("all_gather", "reduce_scatter"):
                mine, theirs = sent[name], plain[name]
                assert (mine.bytes, mine.bytes_sent) == (theirs.bytes, theirs.bytes_sent), name
                assert mine.calls == theirs.calls + more, name

    on_ranks(program)
