"""Asynchronous pipelines beside one process that keeps all versions of all weights in lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.comm.faults import Delay, Reorder, Synchronous
from hpcml.parallel import offload
from tests.parallel.pipeline.asynchronous import MODELS, RULES, Feed, same, simulated, trained

cases = pytest.mark.parametrize
LONG = Feed((3, 3, 3, 3))
UNEVEN = Feed((5, 5, 5, 5), microbatch=2)
SETTLING = Feed((4, 4, None, 4, 4, None, 4), rates=(0.1, 0.03, 0.2, 0.01, 0.1))
LAYOUTS = [(kind, rule, n) for kind in MODELS for rule in RULES for n in (2, 3, 4)]


def _go(kind: str, rule: str, n: int, feed: Feed, optimizer: str, **options: Any) -> None:
    found = trained(kind, Mesh(dp=1, pp=n), feed, optimizer=optimizer, **RULES[rule], **options)
    same(found, simulated(kind, n, rule, feed, optimizer))


@cases(("kind", "rule", "n"), LAYOUTS)
def test_weights_follow_the_formula(kind: str, rule: str, n: int) -> None:
    """Every bit; calls do not empty the pipeline, so that they are one long run."""
    on_threads(lambda: _go(kind, rule, n, LONG, "adamw"), ranks=n)


@pytest.mark.mpi
@cases(("kind", "rule", "n"), LAYOUTS)
def test_weights_follow_the_formula_with_mpi(kind: str, rule: str, n: int) -> None:
    if Mesh().size == n:
        _go(kind, rule, n, LONG, "momentum")
        _go(kind, rule, n, SETTLING, "adamw")


@cases("optimizer", ["sgd", "momentum"])
@cases("rule", RULES)
def test_other_optimizers(rule: str, optimizer: str) -> None:
    on_threads(lambda: _go("mlp", rule, 3, LONG, optimizer), ranks=3)


@cases("feed", [
    UNEVEN, SETTLING, Feed((7, 7)), Feed((3, 3, 3, 3), 0), Feed((2,) * 7), Feed((1,) * 6),
    Feed((2, 1, 4, 3, 1, 1, 5)), Feed((9, 2, None, 2, 3), 2),
])  # fmt: skip
@cases("rule", RULES)
def test_batches_of_any_size(rule: str, feed: Feed) -> None:
    """And microbatches, those that do not divide it too; learning rates go with the batch."""
    n = 2 if rule == "double" else 3
    if rule == "double" and len(set(feed.sizes) - {None}) > 1:
        pytest.skip("batches of one size")
    feed = feed._replace(microbatch=feed.microbatch or max(s for s in feed.sizes if s))
    on_threads(lambda: _go("gpt", rule, n, feed, "sgd"), ranks=n)


@cases(("rule", "options"), [
    ("stashed", {"activations": "drop"}), ("vertical", {"activations": "drop"}),
    ("stashed", {"activations": "offload"}), ("stashed", {"dtype": "bfloat16"}),
    ("double", {"dtype": "bfloat16"}), ("stashed", {"stages": ("transformer.h.0",)}),
], ids=str)  # fmt: skip
def test_with_other_options(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward again is with the weights of the first time; versions of 16 bits are of 16 bits."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    kept = {name: value for name, value in options.items() if name == "dtype"}

    def program() -> None:
        found = trained("gpt", Mesh(dp=1, pp=2), **RULES[rule], **options)
        same(found, simulated("gpt", 2, rule, where=options.get("stages", ()), **kept))

    on_threads(program, ranks=2)


@cases("rule", RULES)
@cases("layout", [{"dp": 2, "pp": 2}, {"dp": 1, "pp": 2, "tp": 2}, {"dp": 1, "pp": 2, "cp": 2}])
def test_with_other_axes(layout: dict[str, int], rule: str) -> None:
    """Data-parallel ranks make an update of a microbatch each, the mean over their samples."""
    options = {"overlap": True} if layout["dp"] > 1 else {}
    feed = Feed((6, 6, 6), microbatch=2) if rule == "double" else Feed((5, 5, 5), microbatch=1)
    expected = simulated("gpt", 2, rule, feed, "sgd", ranks=layout["dp"], dtype="float64")

    def program() -> None:
        found = trained("gpt", Mesh(**layout), feed, optimizer="sgd", dtype="float64",
                        **RULES[rule], **options)  # fmt: skip
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
        for name, array in expected.parameters.items():
            np.testing.assert_allclose(found.parameters[name], array, rtol=0, atol=1e-12)

    on_threads(program, ranks=4)


@cases("rule", RULES)
def test_on_networks_that_are_slow_or_buffer_nothing(rule: str) -> None:
    faults = [Delay(0.002, seed=1), Reorder(seed=2), Synchronous()]
    on_threads(lambda: _go("mlp", rule, 3, LONG, "adamw"), ranks=3, faults=faults, timeout=20)
