"""The profile of a step: its sums, what counts as work, and that nothing is left behind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hpcml import kernels
from hpcml.autograd import Tensor
from hpcml.autograd.primitives import Primitive
from hpcml.bench import profile, profile_hooks
from hpcml.bench.profile_hooks import Profile
from hpcml.bench.step import SIZES, Size, batch_of, our_step
from hpcml.cli import main

TINY = Size(2, 2, 32, 16, 2)


def hooked() -> dict[Any, Any]:
    """Everything that the clocks replace."""
    module = kernels.compiled("float32")
    places: dict[Any, Any] = {("kernel", k): f for k, f in profile_hooks.kernels_of(module)}
    places |= {("np", name): f for name, f in profile_hooks.array_functions()}
    for primitive in Primitive.made:
        places[id(primitive)] = primitive.forward, primitive.remake, tuple(primitive.adjoints)
    places["backward"] = Tensor.backward
    return places


def profiled() -> tuple[Profile, float, float]:
    """A clocked step, and the losses of two models after it: clocked and not."""
    steps, batch = [our_step(TINY), our_step(TINY)], batch_of(TINY)
    found = Profile()
    with found.hung_up(kernels.compiled("float32")), found.step():
        steps[0](batch)
    steps[1](batch)
    return found, steps[0](batch), steps[1](batch)


def test_a_clocked_step_is_the_same_and_leaves_nothing_behind() -> None:
    before = hooked()
    _, clocked, plain = profiled()
    assert clocked == plain
    assert hooked() == before


def test_an_error_in_a_clocked_step_leaves_nothing_behind_either() -> None:
    before = hooked()
    step, found = our_step(TINY), Profile()
    tokens, target = batch_of(TINY)
    with found.hung_up(kernels.compiled("float32")):
        assert hooked() != before
        with pytest.raises(IndexError, match="outside"):
            step((tokens + 1000, target))
        assert found.within is None and not found.working
    assert hooked() == before


def test_every_use_and_every_kernel_is_counted() -> None:
    found, _, _ = profiled()
    calls = {key: span.calls for key, span in found.spans.items() if span.calls}
    layers, norms = TINY.layers, 2 * TINY.layers + 1
    for part in ("forward", "adjoint 0", "adjoint 1"):
        assert calls["linear", part] == 4 * layers + 1
    assert calls["packed_attention", "forward"] == calls["gelu", "adjoint 0"] == layers
    assert calls["layer_norm", "forward"] == calls["layer_norm", "adjoint 1"] == norms
    assert ("layer_norm", "adjoint 2") not in calls  # the model has no biases
    # What linear layers had from them is made again, and counts for them.
    assert (calls["gelu", "again"], calls["layer_norm", "again"]) == (layers, norms)
    assert found.span("linear", "adjoint 0").others == layers + norms
    for (name, part), span in found.spans.items():
        assert 0 <= span.work <= span.nanoseconds
        if name in ("linear", "layer_norm", "gelu", "packed_attention"):
            assert span.works == span.calls  # one kernel each
        elif part == "alone" and span.calls:
            assert span.works == span.calls and span.work == span.nanoseconds
    inside = sum(span.nanoseconds for span in found.spans.values())
    assert inside == sum(found.clocked) < found.begun[-1] - found.begun[0]
    assert found.begun == sorted(found.begun) and not found.working


def test_only_large_arrays_are_work() -> None:
    found = Profile()
    add = found.work(np.add, "np.add", 4096)
    np.testing.assert_array_equal(add(np.ones(2), 1), np.full(2, 2.0))
    assert found.span("np.add", "alone").works == 0
    add(np.ones(512), 1)
    assert found.span("np.add", "alone").works == 1


def test_what_the_clocks_and_calls_cost_is_moved_where_it_belongs() -> None:
    found = Profile()
    found.begun, found.clocked = [0, 10_000, 20_000, 40_000], [6000, 5000, 3000]
    found.outermost = [[2, 0], [1, 0], [0, 3]]
    forward, adjoint = found.span("a", "forward"), found.span("a", "adjoint 0")
    forward.calls, forward.nanoseconds, forward.works, forward.work = 2, 6000, 2, 4000
    adjoint.calls, adjoint.nanoseconds, adjoint.others = 1, 5000, 1
    alone = found.span("k", "alone")
    alone.calls = alone.works = 3
    alone.nanoseconds = alone.work = 3000
    result = profile.account(found, {"primitive": (10, 50), "work": (20, 70)}, call=100)
    rows = {(row["name"], row["part"]): row for row in result["rows"]}
    expected = {
        ("a", "forward"): (6000 - 2 * 10 - 2 * 70, 4000 - 2 * 120),
        ("a", "adjoint 0"): (5000 - 10 - 40, 0),
        ("k", "alone"): (3000 - 3 * 20, 3000 - 3 * 120),
    }
    for key, (seconds, work) in expected.items():
        assert rows[key]["seconds"] == pytest.approx(seconds * 1e-9)
        assert rows[key]["work"] == pytest.approx(work * 1e-9)
    assert {k: round(v * 1e9) for k, v in result["between"].items()} == {
        "forward": 4000 - 2 * 40, "backward": 5000 - 40, "update": 17_000 - 3 * 50,
    }  # fmt: skip
    assert result["clocks"] == pytest.approx((5 * 70 + 3 * 50 + 40) * 1e-9)
    assert result["step"] + result["clocks"] == pytest.approx(40_000e-9)


def test_the_report_adds_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "small", TINY)
    monkeypatch.setattr(profile, "rounds_for", lambda size: 4)
    before = hooked()
    assert main(["bench", "profile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert hooked() == before
    assert (report["bench"], report["version"], report["rounds"]) == ("profile", 1, 4)
    assert report["size"]["width"] == 32 and report["floor"] > 0 < report["call"]
    rows = report["rows"]
    assert rows == sorted(rows, key=lambda row: -row["seconds"])
    seconds = sum(row["seconds"] for row in rows) + sum(report["between"].values())
    assert seconds == pytest.approx(report["step"])
    assert report["work"] + report["overhead"] == pytest.approx(report["step"])
    assert report["overhead_share"] == report["overhead"] / report["step"]
    text = profile.table(report)
    for name in ("linear", "adam_update", "block_squares", "between them", "overhead", "floor"):
        assert name in text
