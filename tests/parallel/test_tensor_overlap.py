"""Linear layers that communicate in chunks beside their products: as without, and really beside."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import hpcml
from hpcml import Tensor, kernels
from hpcml.autograd.ops import linear as products
from hpcml.comm import Axis, Mesh, run
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel.tensor import Positions
from hpcml.parallel.tensor.overlap import gathered_linear, scattered_linear
from tests.parallel.cases import serial_mesh, values
from tests.parallel.chunked import (
    IN,
    OUT,
    Arrays,
    Needs,
    arrays,
    axis_of_all,
    normal,
    results,
    uneven,
    whole_numbers,
)
from tests.ranks import OnRanks, on_ranks_of

cases = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("rings")
on_ranks = on_ranks_of(axis_of_all)
BATCHES: list[tuple[int, ...]] = [(), (1,), (2,), (5,), (2, 3), (0,)]
LAYERS = ("gathered", "gathered without bias", "scattered")


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
