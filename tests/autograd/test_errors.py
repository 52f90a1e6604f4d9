"""Users' mistakes: the message holds the operator and the shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcml.autograd import Context, Tensor, primitive
from hpcml.autograd.ops import shape
from hpcml.errors import UserError
from hpcml.nn import functional as F
from hpcml.nn.part import Part
from tests.autograd.support import Array, leaf, normal

A, B = Tensor(normal(2, 3)), Tensor(normal(4, 5))
INTEGERS = Tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("name", "function"),
    [("add", lambda: A + B), ("sub", lambda: A - B), ("mul", lambda: A * B), ("div", lambda: A / B),
     ("power", lambda: A**B), ("matmul", lambda: A @ B), ("linear", lambda: F.linear(A, B))],
)  # fmt: skip
def test_shapes_that_do_not_fit(name: str, function: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as caught:
        function()
    text = str(caught.value)
    assert text.startswith(f"{name}(") and "(2, 3)" in text and "(4, 5)" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kind", "function", "parts"),
    [
        (
            ValueError,
            lambda: F.linear(A, Tensor(normal(4, 3)), Tensor(normal(3))),
            ["linear(", "(4, 3)", "(3,)"],
        ),
        (TypeError, lambda: F.linear(A.float(), Tensor(normal(4, 3))), ["float32", "float64"]),
        (TypeError, lambda: A @ A.float().T, ["matmul(", "float32", "float64"]),
        (ValueError, lambda: F.layer_norm(A, (4,)), ["layer_norm((2, 3)", "(4,)"]),
        (
            ValueError,
            lambda: F.layer_norm(A, (3,), Tensor(normal(2))),
            ["layer_norm(", "weight (2,)", "3"],
        ),
        (ValueError, lambda: F.layer_norm(A, (3,), None, Tensor(normal(4))), ["bias (4,)", "3"]),
        (TypeError, lambda: F.layer_norm(A, (3,), Tensor([1.0, 2, 3])), ["float64", "float32"]),
        (TypeError, lambda: F.layer_norm(INTEGERS, (3,)), ["int64"]),
        (TypeError, lambda: F.gelu(INTEGERS), ["gelu((2, 3))", "int64", ".float()"]),
        (TypeError, lambda: F.dropout(INTEGERS), ["int64"]),
        (ValueError, lambda: F.gelu(A, "fast"), ['approximate="fast"', "tanh"]),
        (
            ValueError,
            lambda: F.cross_entropy(A, np.array([1])),
            ["cross_entropy(", "(2, 3)", "(1,)"],
        ),
        (
            ValueError,
            lambda: F.cross_entropy(A.reshape(1, 2, 3), np.ones((3, 1), int)),
            ["(1, 2, 3)", "(1, 3)", "(3, 1)"],
        ),
        (ValueError, lambda: F.cross_entropy(A[0], np.array(1)), ["(3,)", "(N, C)"]),
        (IndexError, lambda: F.cross_entropy(A, np.array([1, 3])), ["target 3", "0..2"]),
        (IndexError, lambda: F.cross_entropy(A, np.array([1, -1])), ["target -1", "0..2"]),
        (TypeError, lambda: F.cross_entropy(A, np.array([1.0, 2])), ["integers", "float64"]),
        (
            ValueError,
            lambda: F.cross_entropy(A, np.array([1, 2]), reduction="all"),
            ['"all"', '"mean"'],
        ),
        (IndexError, lambda: F.embedding(np.array([2]), A), ["embedding(", "index 2", "0..1"]),
        (IndexError, lambda: F.embedding(-1, A), ["index -1", "0..1"]),
        (TypeError, lambda: F.embedding(np.array([0.5]), A), ["integers", "float64"]),
        (ValueError, lambda: F.mse_loss(A, B), ["mse_loss", "(2, 3)", "(4, 5)"]),
        (ValueError, lambda: F.mse_loss(A, A, reduction="x"), ['"x"', '"sum"']),
        (ValueError, lambda: F.dropout(A, 1.5), ["p=1.5", "0 and 1"]),
        *[
            (ValueError, lambda part=part: F.dropout(A, part=part), ["dropout((2, 3))", str(part)])
            for part in (
                Part((2, 4), 1, ((0, 2),)),
                Part((2, 3), 1, ((1, 4),)),
                Part((3, 3), 0, ((0, 2),)),
                Part((2, 3, 1), 1, ((0, 3),)),
            )
        ],
        (ValueError, lambda: F.scaled_dot_product_attention(A, A, A), ["attention(", "(2, 3)"]),
        (
            ValueError,
            lambda: F.packed_self_attention(A.reshape(1, 2, 3), 2),
            ["packed_attention(", "3", "heads(2)"],
        ),
        (
            ValueError,
            lambda: F.conv2d(A.reshape(1, 1, 2, 3), Tensor(normal(1, 2, 1, 1))),
            ["conv2d(", "(1, 1, 2, 3)", "(1, 2, 1, 1)"],
        ),
        (
            ValueError,
            lambda: F.max_pool2d(A.reshape(1, 1, 2, 3), 4),
            ["max_pool2d", "(4, 4)", "(2, 3)"],
        ),
        (ValueError, lambda: A.reshape(4), ["reshape((2, 3))", "(4,)"]),
        (ValueError, lambda: A.expand(4, 3), ["expand((2, 3))", "(4,3)"]),
        (ValueError, lambda: A.expand(-1, 2, 3), ["expand", "-1"]),
        (ValueError, lambda: A.split([1, 2]), ["split([1, 2])", "2"]),
        (ValueError, lambda: A.split(0), ["split(0)", "at least 1"]),
        (ValueError, lambda: A.clamp(), ["clamp", "min"]),
        (ValueError, lambda: shape.cat([A, B]), ["cat((2, 3), (4, 5))"]),
        (IndexError, lambda: A[5], ["getitem((2, 3))", "5"]),
        (IndexError, lambda: A.unsqueeze(4), ["4", "-3..2"]),
        (IndexError, lambda: A.squeeze(2), ["2", "-2..1"]),
        (IndexError, lambda: A.transpose(0, 2), ["2", "-2..1"]),
        (IndexError, lambda: A.sum(2), ["sum((2, 3))", "2"]),
        (TypeError, lambda: A + "text", ["add("]),
    ],
)
def test_mistakes(kind: type[Exception], function: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        function()
    text = str(caught.value).replace("4, 3)' ", "4,3) ")
    for part in parts:
        assert part in text or part.replace(",", ", ") in text, text
    assert "\n" not in text


def test_backward_without_what_it_needs() -> None:
    x = leaf(normal(2, 3))
    with pytest.raises(RuntimeError, match=r"needs one element, not shape \(2, 3\).*sum\(\)"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"shape \(3,\) for a tensor of shape \(2, 3\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="no recorded operation"):
        (x.detach() * 2).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(2,\) for a tensor of shape \(2, 3\)"):
        x.grad = Tensor(normal(2))
    out = x * 2
    with pytest.raises(RuntimeError, match="only leaves"):
        out.requires_grad_()
    with pytest.raises(RuntimeError, match="leaves only"):
        out.register_post_accumulate_grad_hook(print)
    (x * 2).backward([[1, 2, 3], [4, 5, 6]])  # anything NumPy makes that shape of
    np.testing.assert_array_equal(x.gradient, [[2, 4, 6], [8, 10, 12]])


def test_an_adjoint_of_a_wrong_shape() -> None:
    @primitive
    def bad(ctx: Context, a: Array) -> Array:
        return a * 2

    bad.adjoint(lambda ctx, g: g[:1])
    with pytest.raises(RuntimeError, match=r"bad: adjoint 0 returned shape \(1,\).*shape \(3,\)"):
        bad(leaf(normal(3))).sum().backward()


def test_errors_of_the_users_own_kind_stay() -> None:
    @primitive
    def refuse(ctx: Context, a: Array) -> Array:
        raise UserError("no")

    with pytest.raises(UserError, match=r"^refuse\(\(3,\)\): no$"):
        refuse(leaf(normal(3)))
