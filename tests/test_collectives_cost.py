"""What collectives cost in memory and messages, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml import Tensor, collectives, memory
from hpcml.comm import Axis, Cut, Halo, Mesh, run


def test_an_axis_of_one_rank_costs_nothing() -> None:
    mesh = Mesh(layout={"dp": 1})
    axis, x = mesh["dp"], Tensor(np.ones((2, 3)), True)
    assert collectives.copy(x, axis) is x
    assert collectives.all_reduce(x, axis, to="R") is x
    assert collectives.all_gather(x, axis, 1, to="I") is x
    assert collectives.scatter(x, axis, 1, source="R") is x
    assert collectives.reduce_scatter(x, axis) is x
    assert collectives.all_to_all(x, axis, 0, 1) is x
    assert collectives.halo_exchange(x, Halo(mesh, {0: Cut("dp", 2, width=0)})) is x
    assert collectives.halo_exchange(x, Halo(mesh, {0: Cut("dp", 2)})).shape == (4, 3)
    assert collectives.copy(np.ones(2), axis).tolist() == [1, 1]


def test_results_are_counted_and_blocks_in_order_are_not_copied() -> None:
    def program() -> None:
        axis, account = Mesh()["dp"], memory.account()
        x = Tensor(memory.empty((1, 4, 1000), np.float64))
        x.data[...] = axis.rank

        def peaks(call: Callable[[], Tensor]) -> tuple[int, int]:
            """Bytes of activations and of buffers that a call adds, in those of x."""
            before = dict(account.live)
            account.reset_peak()
            call()
            nbytes = x.numpy().nbytes
            return tuple(
                (account.peak[c] - before[c]) // nbytes for c in ("activations", "buffers")
            )

        assert peaks(lambda: collectives.copy(x, axis)) == (0, 0)
        assert peaks(lambda: collectives.scatter(x, axis, 1, source="I")) == (0, 0)
        assert peaks(lambda: collectives.all_gather(x, axis, 0, to="R")) == (2, 0)
        assert peaks(lambda: collectives.all_gather(x, axis, 1, to="R")) == (2, 0)
        assert peaks(lambda: collectives.all_gather(x, axis, 2, to="R")) == (2, 2)
        assert peaks(lambda: collectives.all_to_all(x, axis, 1, 2)) == (1, 1)
        assert collectives.scatter(x, axis, 1, source="R").data.base is not None

    run(program, ranks=2)


WRONG: dict[str, Callable[[Tensor, Axis], Any]] = {
    "all_reduce: to='S': choose": lambda x, axis: collectives.all_reduce(x, axis, to="S"),
    "all_gather: to='P': choose": lambda x, axis: collectives.all_gather(x, axis, to="P"),
    "scatter: source='P': choose": lambda x, axis: collectives.scatter(x, axis, source="P"),
    r"scatter: dim 0 of shape \(3, 4\) cannot be cut into 2 equal blocks: pad it to 4 or give":
        lambda x, axis: collectives.scatter(x, axis, source="I"),
    "reduce_scatter: dim=2 of shape .* there is no such dim":
        lambda x, axis: collectives.reduce_scatter(x, axis, 2),
    r"all_gather: counts=\[3\]: give 0 or more for each of 2 ranks":
        lambda x, axis: collectives.all_gather(x, axis, to="R", counts=[3]),
    r"all_gather: counts=\[4, 4\] take 4 along dim 0 of rank \d, but the shape is \(3, 4\)":
        lambda x, axis: collectives.all_gather(x, axis, to="R", counts=[4, 4]),
    r"reduce_scatter: counts=\[1, 1\] take 2 along dim 0":
        lambda x, axis: collectives.reduce_scatter(x, axis, counts=[1, 1]),
    "all_to_all: split_dim and concat_dim are both 1":
        lambda x, axis: collectives.all_to_all(x, axis, 1, -1),
    "halo of shape .* the block of this rank has 2 in dim 0":
        lambda x, axis: collectives.halo_exchange(x, Halo(Mesh(), {0: Cut("dp", 4)})),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_sent(message: str) -> None:
    def program() -> None:
        mesh = Mesh()
        with pytest.raises(ValueError, match=message) as caught:
            WRONG[message](Tensor(np.ones((3, 4))), mesh["dp"])
        assert "\n" not in str(caught.value)
        assert not mesh.ledger.snapshot()

    run(program, ranks=2)
