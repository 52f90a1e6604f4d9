"""Attention against PyTorch's: functions and the module, all masks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from tests.autograd.support import assert_close, layouts, leaf, normal, same_as_torch

torch = pytest.importorskip("torch")
TF = torch.nn.functional
CAUSAL = np.triu(np.ones((5, 7), bool), 1)
ADDED = normal(5, 7, salt=9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": ~CAUSAL}, {"attn_mask": ADDED},
        {"attn_mask": normal(2, 1, 5, 7)}, {"attn_mask": normal(2, 3, 5, 7) > -1.5, "scale": 0.1},
    ],
    ids=lambda o: ",".join(f"{k}{np.shape(v)}" for k, v in o.items()),
)  # fmt: skip
def test_scaled_dot_product_attention(options: dict[str, Any], dtype: str) -> None:
    mine = dict(options)
    theirs = dict(options)
    if "attn_mask" in options:
        mask = options["attn_mask"]
        mine["attn_mask"] = mask if mask.dtype == bool else mask.astype(dtype)
        theirs["attn_mask"] = torch.tensor(mine["attn_mask"])
    q, k, v = (normal(2, 3, n, 4, dtype=dtype, salt=n + i) for i, n in enumerate((5, 7, 7)))
    for kind in layouts(q):
        same_as_torch(
            lambda *x: F.scaled_dot_product_attention(*x, **mine),
            lambda *x: TF.scaled_dot_product_attention(*x, **theirs),
            *(layouts(a)[kind] for a in (q, k, v)), factor=4,
        )  # fmt: skip


def test_keys_shared_by_heads_without_a_copy() -> None:
    q, k = normal(2, 3, 5, 4), normal(2, 1, 5, 4)
    same_as_torch(
        lambda q, k: F.scaled_dot_product_attention(q, *[k.expand(-1, 3, -1, -1)] * 2),
        lambda q, k: TF.scaled_dot_product_attention(q, *[k.expand(-1, 3, -1, -1)] * 2),
        q, k,
    )  # fmt: skip


def test_a_mask_in_double_leaves_float32_and_a_learned_mask_gets_a_gradient() -> None:
    q = leaf(normal(1, 2, 5, 4, dtype="float32"))
    k = leaf(normal(1, 2, 7, 4, dtype="float32"))
    assert F.scaled_dot_product_attention(q, k, k, ADDED).dtype == np.float32
    same_as_torch(
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m),
        lambda q, k, m: TF.scaled_dot_product_attention(q, k, k, m),
        normal(1, 2, 5, 4), normal(1, 2, 7, 4), normal(2, 5, 7),
    )  # fmt: skip
    with pytest.raises(ValueError, match="either attn_mask or is_causal"):
        F.scaled_dot_product_attention(q, k, k, CAUSAL, is_causal=True)


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3, 4]], ids=str)
def test_a_query_that_sees_no_key_gets_zeros(rows: list[int]) -> None:
    seen = ~CAUSAL
    seen[rows] = False
    q, k, v = (normal(2, 3, n, 4, salt=n + i) for i, n in enumerate((5, 7, 7)))
    for mask in (seen, np.where(seen, 0.3, -np.inf), seen[:, :1]):
        same_as_torch(
            lambda *x, m=mask: F.scaled_dot_product_attention(*x, m),
            lambda *x, m=mask: TF.scaled_dot_product_attention(*x, torch.tensor(m)),
            q, k, v, factor=4,
        )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packed_self_attention(dtype: str, causal: bool) -> None:
    def peer(x: Any) -> Any:
        batch, length, _ = x.shape
        heads = [p.view(batch, length, 2, -1).transpose(1, 2) for p in x.chunk(3, -1)]
        out = TF.scaled_dot_product_attention(*heads, is_causal=causal)
        return out.transpose(1, 2).reshape(batch, length, -1)

    for sizes in [(2, 5, 24), (1, 70, 6), (1, 1, 6)]:
        for x in layouts(normal(*sizes, dtype=dtype)).values():
            same_as_torch(lambda x: F.packed_self_attention(x, 2, 0.0, causal), peer, x, factor=4)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": np.triu(np.ones((5, 6), bool), 2)},
    "float": {"attn_mask": normal(5, 6, salt=3)},
    "by head": {"attn_mask": normal(6, 5, 6, salt=3) > 1},
    "padding": {"key_padding_mask": np.arange(6)[None, :] >= np.array([4, 6, 1])[:, None]},
    "padding added": {"key_padding_mask": normal(3, 6, salt=4)},
    "both": {
        "attn_mask": np.triu(np.ones((5, 6), bool), 3),
        "key_padding_mask": np.arange(6)[None, :] >= np.array([4, 6, 1])[:, None],
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", ["mean", "heads", "none"])
def test_multihead_attention(mask: str, batch_first: bool, weights: str) -> None:
    """Cross attention: weights loaded from PyTorch's module, output, weights, all gradients."""
    for bias in (True, False):
        peer = torch.nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double()
        ours = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double()
        ours.load_state_dict(peer.state_dict())
        compare(ours, peer, mask, weights, batch_first)


def compare(ours: Any, peer: Any, mask: str, weights: str, batch_first: bool) -> None:
    options: dict[str, Any] = {"need_weights": weights != "none"}
    options["average_attn_weights"] = weights == "mean"
    masks = MASKS[mask]
    arrays = [normal(*((3, n) if batch_first else (n, 3)), 8, salt=n) for n in (5, 6, 6)]
    mine, theirs = [leaf(a) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    out, found = ours(*mine, **options, **masks)
    expected, wanted = peer(*theirs, **options, **{k: torch.tensor(v) for k, v in masks.items()})
    assert_close(out.numpy(), expected.detach().numpy())
    assert (found is None) == (wanted is None)
    if found is not None:
        assert_close(found.numpy(), wanted.detach().numpy())
    g = normal(*out.shape, salt=2)
    out.backward(g)
    expected.backward(torch.tensor(g))
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a.gradient, b.grad.numpy())
    parameters = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.gradient, parameters[name].grad.numpy())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_multihead_attention_causal(need_weights: bool, padded: bool) -> None:
    peer = torch.nn.MultiheadAttention(8, 4, batch_first=True).double()
    ours = nn.MultiheadAttention(8, 4, batch_first=True).double()
    ours.load_state_dict(peer.state_dict())
    x = normal(2, 6, 8)
    padding = np.arange(6)[None, :] >= np.array([4, 6])[:, None] if padded else None
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, wanted = peer(
        *[torch.tensor(x)] * 3, None if padding is None else torch.tensor(padding), need_weights,
        causal,
    )  # fmt: skip
    out, found = ours(*[Tensor(x)] * 3, padding, need_weights, is_causal=True)
    assert_close(out.numpy(), expected.detach().numpy())
    if need_weights:
        assert_close(found.numpy(), wanted.detach().numpy())


def test_dropout_acts_while_training_alone() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = Tensor(normal(2, 6, 8, dtype="float32"))
    for need_weights in (True, False):
        module.eval()
        plain = module(x, x, x, need_weights=need_weights)[0].numpy()
        module.dropout = 0.0
        np.testing.assert_allclose(module(x, x, x)[0].numpy(), plain, rtol=1e-4, atol=1e-6)
        module.dropout = 0.5
        module.train()
        assert not np.allclose(module(x, x, x, need_weights=need_weights)[0].numpy(), plain)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=8"):
        nn.MultiheadAttention(8, 3)
    module, x = nn.MultiheadAttention(8, 2).double(), Tensor(normal(5, 8))
    with pytest.raises(ValueError, match=r"query \(5, 8\).*three dimensions"):
        module(x, x, x)
    for a, b in itertools.permutations([(1, 5, 8), (1, 5, 6)]):
        with pytest.raises(ValueError, match=r"linear|matmul"):
            module(Tensor(normal(*a)), Tensor(normal(*b)), Tensor(normal(*b)))
