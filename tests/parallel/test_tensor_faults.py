"""What goes wrong on one of the ranks that divide a model is told on all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import NonFiniteError
from hpcml.parallel.replicas import ReplicaError
from tests.parallel.test_tensor_models import MODELS, make

cases = pytest.mark.parametrize
LAYOUTS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"tp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"dp": 2, "tp": 2}, {"zero": 3}),
    ({"cp": 2, "tp": 2}, {"zero": 1}),
]


def ranks(layout: dict[str, int]) -> int:
    return int(np.prod(list(layout.values())))


@cases(("layout", "options"), LAYOUTS)
def test_a_copy_that_drifts_is_found(layout: dict[str, int], options: dict[str, Any]) -> None:
    """A layer norm is on every rank whole; what ranks divide may differ among them."""

    def program() -> str:
        mesh = Mesh(**layout)
        step = make("gpt", mesh, **options)
        step(MODELS["gpt"][2](0))
        step.check_replicas()
        for bucket in step.optimizer.storage.buckets:
            if mesh["tp"].rank == 1 and bucket.layout.get("tp", "R") == "R":
                bucket.data[...] += 1e-9
        with pytest.raises(ReplicaError) as caught:
            step.check_replicas()
        return str(caught.value)

    said = on_threads(program, ranks=ranks(layout))
    assert said == [said[0]] * len(said)
    assert "replicas along tp have drifted apart" in said[0] and "rank" in said[0]


@cases(("layout", "options"), LAYOUTS)
def test_what_is_not_finite_is_named(layout: dict[str, int], options: dict[str, Any]) -> None:
    """A weight, of which one rank has the part that is not."""

    def program() -> list[str]:
        mesh = Mesh(**layout)
        said = []
        for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_proj.weight"):
            step = make("gpt", mesh, **options)
            values = {name: array.copy() for name, array in step.gathered()}
            values[name][-1, -1] = np.inf
            step.model.load_state_dict(values, strict=False)
            with pytest.raises(NonFiniteError) as caught:
                step(MODELS["gpt"][2](0))
            assert f"parameter {name} is not finite: 1 inf" in str(caught.value)
            said.append(str(caught.value))
        return said

    said = on_threads(program, ranks=ranks(layout))
    assert said == [said[0]] * len(said)


@cases(("layout", "options"), LAYOUTS)
def test_outputs_that_overflow_are_named(layout: dict[str, int], options: dict[str, Any]) -> None:
    def program() -> str:
        mesh = Mesh(**layout)
        step = make("gpt", mesh, "float32", **options)
        values = {name: array.copy() for name, array in step.gathered()}
        values["transformer.h.1.mlp.c_fc.weight"][-1] = 3e38  # of the last rank's features
        values["transformer.h.1.mlp.c_fc.weight"][-1, ::2] = -3e38
        values["transformer.h.1.ln_2.weight"][...] = 1e3
        step.model.load_state_dict(values, strict=False)
        with pytest.raises(NonFiniteError) as caught:
            step(MODELS["gpt"][2](0))
        return str(caught.value)

    said = on_threads(program, ranks=ranks(layout))
    assert said == [said[0]] * len(said)
    assert "output of transformer.h.1.mlp.c_fc" in said[0]
