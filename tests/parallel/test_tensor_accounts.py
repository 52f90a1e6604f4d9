"""What tensor parallelism sends and holds, to the byte, beside the papers' formulas."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import hpcml
from hpcml import memory
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.comm.choice import VARIABLE
from hpcml.comm.ledger import Count
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel import Step

cases = pytest.mark.parametrize
B, S, H, HEADS, VOCAB, ITEM = 3, 24, 48, 12, 65, 4
MICROBATCHES = 2


@pytest.fixture
def rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All-reduces and their halves by the algorithms whose volume the papers count."""
    chosen = {"allreduce": "ring", "allgather": "ring", "reduce_scatter": "pairwise"}
    rows = [f'{operation} = [[inf, "{name}"]]' for operation, name in chosen.items()]
    sections = [f"[node.{ranks}]\n" + "\n".join(rows) for ranks in (2, 3, 4)]
    file = tmp_path / "rings.toml"
    file.write_text("\n".join(sections))
    monkeypatch.setenv(VARIABLE, str(file))


def make(layers: int, **options: Any) -> Step:
    mesh = Mesh(dp=1, **{options.pop("along", "tp"): Mesh().size})
    return hpcml.parallelize(
        GPT(VOCAB, S, layers, HEADS, H), loss=NextTokenLoss(), optimizer=hpcml.optim.AdamW,
        lr=1e-3, mesh=mesh, microbatch=B, **options,
    )  # fmt: skip


def batch(samples: int = B * MICROBATCHES) -> tuple[np.ndarray, np.ndarray]:
    made = np.random.default_rng(0).integers(0, VOCAB, (2, samples, S))
    return made[0], made[1]


def sent(layers: int, **options: Any) -> dict[str, Count]:
    """Along tp, in one step."""
    step = make(layers, **options)
    step(batch())
    before = step.mesh.ledger.snapshot()
    step(batch())
    return (step.mesh.ledger.snapshot() - before)["tp"]


def of_a_layer(**options: Any) -> dict[str, Count]:
    """What one layer more sends in a microbatch; its sums of gradients in a step."""
    more, less = sent(3, **options), sent(1, **options)
    found = {}
    for operation, count in more.items():
        of_two = count - less.get(operation, Count())
        by_step = operation == "all_reduce" and "sequence_parallel" in options
        values = [value / 2 / (1 if by_step else MICROBATCHES) for value in vars(of_two).values()]
        assert all(value.is_integer() for value in values)
        found[operation] = Count(*map(int, values))
    return found


BSH = B * S * H * ITEM


@cases("ranks", [2, 3, 4])
def test_a_layer_costs_four_all_reduces(rings: None, ranks: int) -> None:
    """Shoeybi et al. 2019, section 3: two forward, two backward, of b s h each."""

    def program() -> None:
        found = of_a_layer()
        assert set(found) == {"all_reduce"}
        count = found["all_reduce"]
        assert (count.calls, count.bytes) == (4, 4 * BSH)
        assert count.bytes_sent == 8 * BSH * (ranks - 1) // ranks

    on_threads(program, ranks=ranks)


@cases(("options", "forward"), [
    ({}, {"all_reduce": 2}),
    ({"sequence_parallel": True}, {"all_gather": 2, "reduce_scatter": 2}),
    ({"tensor_split": "naive"}, {"all_reduce": 4}),
], ids=str)  # fmt: skip
def test_half_of_them_forward(rings: None, options: dict[str, Any], forward: Any) -> None:
    """Of the calls of a layer and microbatch; the rest comes in backward."""

    def calls(layers: int) -> tuple[dict[str, int], dict[str, int]]:
        step = make(layers, **options)
        tokens, target = batch(B)
        ledger = step.mesh.ledger
        start = ledger.snapshot()
        loss = step.loss(step.model(tokens), hpcml.Tensor(target))
        middle = ledger.snapshot()
        loss.backward()
        halves = (middle - start)["tp"], (ledger.snapshot() - middle)["tp"]
        ahead, back = ({op: count.calls for op, count in half.items()} for half in halves)
        return ahead, back

    def program() -> None:
        more, less = calls(2), calls(1)
        ahead, back = ({op: n - b.get(op, 0) for op, n in a.items() if n > b.get(op, 0)}
                       for a, b in zip(more, less, strict=True))  # fmt: skip
        assert ahead == forward
        naive = {"all_gather": 4} if "tensor_split" in options else None
        assert back == (naive or dict(zip(forward, list(forward.values())[::-1], strict=True)))

    on_threads(program, ranks=2)


@cases("ranks", [2, 3, 4])
@cases("partition", ["no", "yes"])
def test_with_sequence_parallelism_the_same_bytes(rings: None, ranks: int, partition: str) -> None:
    """Korthikanti et al. 2022, section 4.2.2: all-gather and reduce-scatter are an all-reduce.

    Where a rank keeps its part of what it has gathered, it gathers it once more in backward. Norms
    and biases, used for the positions of a rank, have their gradients added up once a step.
    """

    def program() -> None:
        found = of_a_layer(sequence_parallel=True, partition_activations=partition)
        again = 2 if partition == "yes" else 0
        gathers, scatters = found["all_gather"], found["reduce_scatter"]
        assert (gathers.calls, gathers.bytes) == (4 + again, (4 + again) * BSH)
        assert (scatters.calls, scatters.bytes) == (4, 4 * BSH)
        assert found["all_reduce"].bytes == (2 * 2 + 2) * H * ITEM
        assert gathers.bytes_sent + scatters.bytes_sent == (8 + again) * BSH * (ranks - 1) // ranks

    on_threads(program, ranks=ranks)


def test_the_naive_split_costs_three_times_as_much(rings: None) -> None:
    """An all-reduce of all outputs forward, an all-gather of the inputs' gradients backward."""

    def program() -> None:
        found = of_a_layer(tensor_split="naive")
        sums, gathers = found["all_reduce"], found["all_gather"]
        assert (sums.calls, sums.bytes) == (4, (3 + 1 + 4 + 1) * BSH)
        assert (gathers.calls, gathers.bytes) == (4, (1 + 1 + 1 + 4) * BSH)
        assert sums.bytes_sent + gathers.bytes_sent == (2 * 9 + 7) * BSH // 2

    on_threads(program, ranks=2)


def test_what_is_around_the_layers(rings: None) -> None:
    """An all-reduce for the embedding, one for the head, three numbers a token, and the norm."""

    def program() -> None:
        count, layer = sent(1)["all_reduce"], of_a_layer()["all_reduce"]
        assert count.calls == MICROBATCHES * (layer.calls + 2 + 2) + 1
        tokens = 3 * B * S * ITEM
        assert count.bytes == MICROBATCHES * (layer.bytes + 2 * BSH + tokens) + 8

    on_threads(program, ranks=2)


# --- memory -------------------------------------------------------------------------------------

REPLICATED = (".ln_1.", ".ln_2.", "ln_f.", "c_proj.bias", "wpe.")
"""What every tensor-parallel rank holds whole."""


class Held(NamedTuple):
    """Bytes of a rank by category."""

    params: int
    grads: int
    optim: int


@cases("ranks", [2, 3, 4])
@cases("sequence_parallel", [False, True])
def test_states_divide_by_the_ranks(ranks: int, sequence_parallel: bool) -> None:
    """Parameters, gradients and optimizer state: all but what is listed, and the padding."""

    def program() -> None:
        gc.collect()
        before = dict(memory.account().live)
        step = make(2, sequence_parallel=sequence_parallel)
        step(batch())
        live = memory.account().live
        held = Held(*(live[name] - before[name] for name in Held._fields))
        named = list(step.model.named_parameters())
        whole = sum(np.prod(p.whole_shape) for name, p in named)
        copies = sum(p.numel() for name, p in named if any(r in name for r in REPLICATED))
        assert all((p.part is None) == any(r in name for r in REPLICATED) for name, p in named)
        own = copies + (whole - copies) / ranks
        uneven = H  # a row of the vocabulary more on the first ranks
        padding = sum(b.size - sum(p.numel() for p in b.parameters)
                      for b in step.optimizer.storage.buckets)  # fmt: skip
        assert padding < own / 8
        for name, arrays in (("params", 1), ("grads", 1), ("optim", 2)):
            elements = getattr(held, name) / ITEM / arrays
            assert abs(elements - own - padding) <= uneven, name

    on_threads(program, ranks=ranks)


def saved(layers: int, **options: Any) -> int:
    """Bytes of activations that wait for backward after a forward of one microbatch."""
    step = make(layers, **options)
    tokens, target = batch(B)
    gc.collect()
    before = memory.account().live["activations"]
    loss = step.loss(step.model(tokens), hpcml.Tensor(target))
    found = memory.account().live["activations"] - before
    loss.backward()
    return found


@cases("ranks", [1, 2, 3, 4])
@cases(
    ("options", "whole", "divided"),
    [
        ({}, 2, 8),
        ({"partition_activations": "yes"}, 0, 10),
        ({"sequence_parallel": True}, 2, 10),
        ({"sequence_parallel": True, "partition_activations": "yes"}, 0, 12),
        ({"along": "cp"}, 0, 10),
    ],
    ids=str,
)
def test_activations_of_a_layer(
    ranks: int, options: dict[str, Any], whole: int, divided: int
) -> None:
    """Elements a layer saves, in s b h: Korthikanti et al. 2022, table 2, less what we never store.

    The paper counts 34 + 5 a s / h bytes in 16 bits: 16 elements of 2 bytes, 2 bytes of dropout
    masks, which are made again from their counters here, and the attention's 5 a s / h, which its
    kernel makes again too ("selective recomputation"). So are GELU's results (4 elements) and those
    of layer norms (2), unless they are gathered. What is kept whole by every tensor-parallel rank
    are inputs of layer norms (2) or gathered inputs of column-parallel layers (2). In addition a
    layer saves mean and deviation of each row of its norms, a sum for each row of the attention.
    """
    if ranks == 1 and options:
        pytest.skip("on one rank nothing is divided")

    def program() -> None:
        found = (saved(3, **options) - saved(1, **options)) / 2
        whole_norms = not options or options == {"partition_activations": "yes"}
        rows = B * S * ((4 * ranks if whole_norms else 4) + HEADS)
        # A part begins at the same place on all ranks, so the last may be filled up.
        filled = 8 * ranks if "partition_activations" in options else 0
        expected = (B * S * H * (whole * ranks + divided) + rows) / ranks
        assert expected <= found / ITEM <= expected + filled

    on_threads(program, ranks=ranks)
