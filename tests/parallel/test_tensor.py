"""Tensor-parallel layers: values, gradients, first values of the serial ones, and what is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import Tensor, nn, rng
from hpcml.comm import Axis, Mesh, run
from hpcml.errors import UserError
from hpcml.nn import functional as F
from hpcml.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from tests.ranks import OnRanks, on_ranks_of

cases = pytest.mark.parametrize
N, VOCAB, WIDTH, INNER = 6, 11, 5, 7  # none of which many numbers divide


on_ranks = on_ranks_of(lambda: Mesh({"tp": Mesh().size})["tp"])


def fp64(module: nn.Module) -> nn.Module:
    """Named, with values of float64."""
    for name, parameter in module.named_parameters():
        parameter.name = name
    return module.to(np.float64)


class Net(nn.Module):
    """Tokens to logits through two linear layers; its weights are made, not given."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Any) -> Tensor:
        x = self.wte(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


def divided(net: Net, axis: Axis) -> Net:
    """The same, tensor-parallel."""
    net.wte = VocabParallelEmbedding(net.wte, axis)
    net.up, net.down = ColumnParallelLinear(net.up, axis), RowParallelLinear(net.down, axis)
    net.head = ColumnParallelLinear(net.head, axis)
    return net


def batch() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    target = generator.integers(0, VOCAB, N)
    target[2] = -100
    return generator.integers(0, VOCAB, N), target


def same_as_serial(axis: Axis) -> None:
    tokens, target = batch()
    with rng.samples(3, 0):
        serial, parallel = fp64(Net()), divided(fp64(Net()), axis)
        expected = F.cross_entropy(serial(tokens), target)
        expected.backward()
        before = axis.ledger.snapshot()
        loss = vocab_parallel_cross_entropy(parallel(tokens), target, axis, classes=VOCAB)
        loss.backward()
        counts = axis.ledger.snapshot() - before
    assert abs(loss.item() - expected.item()) < 1e-12
    whole = dict(serial.named_parameters())
    for name, mine in parallel.named_parameters():
        theirs = whole[name]
        index = ... if mine.part is None else mine.part.index
        assert mine.data.tobytes() == np.ascontiguousarray(theirs.data[index]).tobytes(), name
        np.testing.assert_allclose(mine.grad.numpy(), theirs.grad.numpy()[index], 1e-12, 1e-14)
        held = int(axis.allreduce(np.array([mine.numel()]))[0])
        copies = axis.size if name == "down.bias" else 1  # all else is divided, without a rest
        assert held == copies * theirs.numel(), name
    if axis.size > 1:
        sent = counts["tp"]["all_reduce"]
        # forward: embedding, down, two of the loss; backward: up and head
        assert (sent.calls, sent.bytes) == (6, 8 * (4 * N * WIDTH + 3 * N))


def test_a_net_is_that_of_one_rank(on_ranks: OnRanks) -> None:
    on_ranks(same_as_serial)


def test_packed_projections_are_divided_by_heads(on_ranks: OnRanks) -> None:
    """Each rank has its heads of queries, keys and values, and attends to them alone."""

    def program(axis: Axis) -> None:
        heads, size = 12, 2
        width = heads * size
        x = np.random.default_rng(1).standard_normal((2, 3, width))
        with rng.samples(4, 0):
            serial, parallel = (
                fp64(nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(width, width)))
                for _ in range(2)
            )
            qkv, out = parallel.children()
            column = ColumnParallelLinear(qkv, axis, packed=3)
            row = RowParallelLinear(out, axis)
            first, last = serial.children()
            given, expected_x = Tensor(x, True), Tensor(x.copy(), True)
            y = row(F.packed_self_attention(column(given), heads // axis.size, 0.0, True, "a"))
            z = last(F.packed_self_attention(first(expected_x), heads, 0.0, True, "a"))
            g = np.random.default_rng(2).standard_normal(x.shape)
            y.backward(g)
            z.backward(g)
        np.testing.assert_allclose(y.numpy(), z.numpy(), 1e-12, 1e-14)
        np.testing.assert_allclose(given.grad.numpy(), expected_x.grad.numpy(), 1e-11, 1e-13)
        for mine_, theirs in ((column.weight, first.weight), (row.weight, last.weight)):
            index = ... if mine_.part is None else mine_.part.index
            np.testing.assert_allclose(mine_.grad.numpy(), theirs.grad.numpy()[index], 1e-11, 1e-13)

    on_ranks(program)


@cases("wrong", [-1, VOCAB])
def test_tokens_and_targets_out_of_range(on_ranks: OnRanks, wrong: int) -> None:
    def program(axis: Axis) -> None:
        embedding = VocabParallelEmbedding(nn.Embedding(VOCAB, WIDTH), axis)
        with pytest.raises(IndexError, match=f"{wrong} is outside 0..{VOCAB - 1}"):
            embedding(np.array([wrong]))
        head = ColumnParallelLinear(nn.Linear(WIDTH, VOCAB), axis)
        logits = head(Tensor(np.ones((1, WIDTH), np.float32)))
        with pytest.raises(IndexError, match=f"{wrong} is outside 0..{VOCAB - 1}"):
            vocab_parallel_cross_entropy(logits, np.array([wrong]), axis, classes=VOCAB)

    on_ranks(program)


def test_what_cannot_be_divided_is_one_line_with_a_remedy() -> None:
    def program() -> None:
        axis = Mesh(layout={"tp": 3})["tp"]
        with pytest.raises(UserError, match=r"outputs=2 .* 3 ranks along tp: set mesh.tp=2"):
            ColumnParallelLinear(nn.Linear(4, 2), axis)

    run(program, ranks=3)


def test_a_tied_head_is_divided_once(on_ranks: OnRanks) -> None:
    """Values and the gradient of both uses are those of one rank; another division is refused."""

    def program(axis: Axis) -> None:
        def tied() -> tuple[nn.Embedding, nn.Linear]:
            table, head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
            head.weight = table.weight
            fp64(nn.Sequential(table, head))
            return table, head

        tokens, target = batch()
        with rng.samples(5, 0):
            (table, head), (whole, last) = tied(), tied()
            F.cross_entropy(last(whole(tokens)), target).backward()
            first, column = VocabParallelEmbedding(table, axis), ColumnParallelLinear(head, axis)
            logits = column(first(tokens))
            vocab_parallel_cross_entropy(logits, target, axis, classes=VOCAB).backward()
        part = table.weight.part
        index = ... if part is None else part.index
        assert table.weight.data.tobytes() == whole.weight.data[index].tobytes()
        found, expected = table.weight.grad.numpy(), whole.weight.grad.numpy()[index]
        np.testing.assert_allclose(found, expected, 1e-12, 1e-14)
        if axis.size > 1:
            with pytest.raises(UserError, match="shared and divided already, along dim 0"):
                RowParallelLinear(head, axis)

    on_ranks(program)


def test_logits_that_are_not_this_ranks_classes(on_ranks: OnRanks) -> None:
    def program(axis: Axis) -> None:
        with pytest.raises(ValueError, match=f"of {VOCAB} classes this rank has"):
            vocab_parallel_cross_entropy(Tensor(np.ones((1, VOCAB + 1))), np.array([0]), axis,
                                         classes=VOCAB)  # fmt: skip

    on_ranks(program)
