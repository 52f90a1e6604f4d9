"""Modules: trees, names, hooks, state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcml import nn, rng
from hpcml.autograd import Tensor
from hpcml.errors import UserError
from hpcml.nn import functional as F
from tests.autograd.support import leaf, normal
from tests.nn.support import network


def test_state_that_does_not_fit_is_one_line_with_all_problems() -> None:
    module = network(nn)
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    before = {k: v.copy() for k, v in state.items()}
    wrong = {k: v + 1 for k, v in state.items() if k != "1.0.bias"}
    wrong["2.0.weight"] = np.zeros((3, 3))
    wrong["extra"] = np.zeros(1)
    with pytest.raises(UserError) as caught:
        module.load_state_dict(wrong)
    text = str(caught.value)
    assert "\n" not in text and "Sequential" in text
    for part in (
        "2.0.weight has shape (3, 3), not (2, 4)",
        "1.0.bias is missing",
        "extra is unexpected",
    ):
        assert part in text
    for key, value in module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[key])
    module.load_state_dict({"1.0.bias": np.full(4, 7.0), "extra": np.zeros(1)}, strict=False)
    assert (module[1][0].bias.numpy() == 7).all()


def test_loading_makes_no_first_values() -> None:
    class Refuses:
        def __call__(self, out: Any, key: int, start: int) -> None:
            raise AssertionError("first values made in vain")

    layer = nn.Linear(3, 4)
    layer.weight.init = layer.bias.init = Refuses()  # type: ignore[union-attr]
    layer.load_state_dict({"weight": normal(4, 3), "bias": normal(4)})
    assert layer.weight.dtype == np.float32
    np.testing.assert_allclose(layer.weight.numpy(), normal(4, 3), rtol=1e-6)


def test_shared_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied().name_parts()
    assert [n for n, _ in model.named_parameters()] == ["embedding.weight"]
    assert list(model.state_dict()) == ["embedding.weight", "head.weight"]
    assert model.embedding.weight.name == "embedding.weight" and model.head.name == "head"
    model.head(model.embedding(np.array([1, 2]))).sum().backward()
    calls: list[Any] = []
    model.zero_grad()
    model.head.weight.register_post_accumulate_grad_hook(calls.append)
    model.head(model.embedding(np.array([1, 2]))).sum().backward()
    assert calls == [model.head.weight] and len(list(model.parameters())) == 1


def test_the_tree() -> None:
    model = network(nn)
    names = [name for name, _ in model.named_modules()]
    assert names == ["", "0", "1", "1.0", "1.1", "2", "2.0", "2.1"]
    assert [n for n, _ in model.named_children()] == ["0", "1", "2"]
    assert len(model) == 3 and model[0] is next(iter(model)) and len(model[1]) == 2
    order: list[str] = []
    model.name_parts().apply(lambda m: order.append(m.name))
    assert order == ["0", "1.0", "1.1", "1", "2.0", "2.1", "2", ""]
    model.eval()
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    assert repr(network(nn)) == repr(model) and "(0): Linear(4, 4, bias=True)" in repr(model)
    layer = nn.Linear(2, 2)
    layer.bias = None
    assert list(layer.state_dict()) == ["weight"]
    del layer.weight
    assert not list(layer.parameters())


def test_mistakes() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(2, 2)

    with pytest.raises(
        AttributeError, match=r"Early: call super\(\).__init__\(\) before setting layer"
    ):
        Early()
    with pytest.raises(TypeError, match="Module defines no forward"):
        nn.Module()(1)
    for make, text in (
        (lambda: nn.Linear(0, 2), "in_features=0"),
        (lambda: nn.Embedding(2, -1), "embedding_dim=-1"),
        (lambda: nn.LayerNorm((2, 0)), "normalized_shape=0"),
        (lambda: nn.Dropout(2), "p=2"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


def test_forward_hooks_replace_and_can_be_removed() -> None:
    layer = nn.Linear(2, 2).double()
    x, other = Tensor(normal(1, 2)), Tensor(normal(1, 2, salt=1))
    seen: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append((m, args))),
        layer.register_forward_pre_hook(lambda m, args: other),
        layer.register_forward_hook(lambda m, args, out: seen.append((args, out))),
        layer.register_forward_hook(lambda m, args, out: out * 2),
    ]
    out = layer(x)
    np.testing.assert_array_equal(
        out.numpy(), 2 * F.linear(other, layer.weight, layer.bias).numpy()
    )
    assert seen[0] == (layer, (x,)) and seen[1][0] == (other,)
    for handle in handles:
        handle.remove()
        handle.remove()
    np.testing.assert_array_equal(layer(x).numpy(), F.linear(x, layer.weight, layer.bias).numpy())
    assert len(seen) == 2


def test_backward_hooks_see_and_replace_gradients() -> None:
    layer, x = nn.Linear(3, 2).double(), leaf(normal(4, 3))
    seen: list[Any] = []
    handles = [
        layer.register_full_backward_pre_hook(lambda m, g: seen.append(("pre", g[0].numpy()))),
        layer.register_full_backward_hook(
            lambda m, gi, go: seen.append(("post", gi[0].numpy(), go[0].numpy()))
        ),
    ]
    g = normal(4, 2)
    layer(x).backward(g)
    assert [s[0] for s in seen] == ["pre", "post"]
    np.testing.assert_array_equal(seen[0][1], g)
    np.testing.assert_allclose(seen[1][1], g @ layer.weight.numpy())
    np.testing.assert_array_equal(seen[1][2], g)
    np.testing.assert_allclose(x.gradient, g @ layer.weight.numpy())  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    layer.register_full_backward_pre_hook(lambda m, g: (g[0] * 2,))
    layer.register_full_backward_hook(lambda m, gi, go: (gi[0] * 10,))
    x.grad = layer.weight.grad = None
    layer(x).backward(g)
    np.testing.assert_allclose(layer.weight.gradient, 2 * g.T @ x.numpy())  # type: ignore[arg-type]
    np.testing.assert_allclose(x.gradient, 20 * g @ layer.weight.numpy())  # type: ignore[arg-type]


def test_backward_hooks_of_a_module_whose_input_needs_no_gradient() -> None:
    embedding = nn.Embedding(4, 2)
    seen: list[Any] = []
    embedding.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go[0].shape)))
    embedding(np.array([1, 2, 3])).sum().backward()
    assert seen == [((None,), (3, 2))]
    embedding.forward = lambda x: (x, x)  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(TypeError, match="one tensor"):
        embedding(np.array([1]))


def test_to_dtype() -> None:
    model = network(nn)
    first = model[2][0].weight.numpy().copy()
    model[2][0].weight.grad = Tensor(first)
    model.double()
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(model[2][0].weight.numpy(), first)
    assert model[2][0].weight.grad is None  # of the old type
    rng.manual_seed(0)
    assert model.float()[0].weight.numpy().dtype == np.float32
