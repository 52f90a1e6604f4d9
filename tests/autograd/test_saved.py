"""What is kept for backward, for how long, and the hooks through which it passes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml import backend, memory
from hpcml.autograd import Tensor, no_grad, saved_tensors_hooks
from hpcml.autograd.backward import backward
from hpcml.autograd.ops import fused, linear, norm
from hpcml.nn import Linear, Parameter
from tests.autograd.support import Array, leaf, normal


def live() -> int:
    gc.collect()
    return sum(memory.account().live.values())


def network(x: Tensor, w: Tensor) -> Tensor:
    y = linear.linear(x, w, None)
    y = fused.gelu(y) * y.tanh() + fused.softmax(y) / 2
    return norm.layer_norm(y, None, None, size=y.shape[-1], eps=1e-5).mean()


def test_account_returns_to_its_start() -> None:
    x, w = leaf(normal(20, 8)), leaf(normal(8, 8))
    before = live()
    out = network(x, w)
    assert live() > before + 4 * x.data.nbytes
    out.backward()
    x.grad = w.grad = None
    assert live() - before <= out.data.nbytes
    del out
    assert live() == before
    out = network(x, w)
    del out  # no backward
    assert live() == before


def test_activations_are_freed_while_backward_goes_on() -> None:
    x = leaf(normal(1000))
    y = x
    for _ in range(50):
        y = y.exp() * 0.01
    account = memory.account()
    gc.collect()
    before = sum(account.live.values())
    account.reset_peak()
    y.sum().backward()
    assert sum(account.peak.values()) < before + 6 * x.data.nbytes
    assert sum(account.live.values()) < before - 40 * x.data.nbytes


def test_the_record_keeps_no_result_that_no_adjoint_needs() -> None:
    x, w = leaf(normal(4, 4)), leaf(normal(4, 4))
    makers: list[Any] = [
        lambda y: y + 1, lambda y: y - x, lambda y: y * 2.0, lambda y: -y, lambda y: y / 3,
        lambda y: y.reshape(16), lambda y: y.sum(0), lambda y: y.transpose(0, 1), lambda y: y[1:],
        lambda y: y.masked_fill(normal(4, 4) > 0, 0.0), lambda y: y.mean(),
        lambda y: linear.linear(y, w.detach(), None), lambda y: y @ w.detach(),
    ]  # fmt: skip
    for make in makers:
        y = x * 2
        block = weakref.ref(y.data.base)
        z = make(y)
        z = z * 1.0  # views keep what they look at
        del y
        gc.collect()
        assert block() is None
        z.backward(np.ones(z.shape))


def made_again(kind: str, defer: bool = False) -> tuple[int, list[Array]]:
    """Bytes kept of GELU, layer norm and the layers that take their results; all gradients."""
    dtype = backend.dtype(kind)
    x, w, v, scale = (leaf(normal(*s).astype(dtype)) for s in ((9, 8), (8, 8), (8, 8), (8,)))
    before = live()
    h = norm.layer_norm(x, scale, scale, size=8, eps=1e-5)
    out = linear.linear(fused.gelu(linear.linear(h, w, None)), v, None)
    del h
    kept = live() - before - out.data.nbytes
    deferred = backward(out, np.ones(out.shape, dtype), defer=defer)
    deferred.compute()
    return kept, [one.gradient for one in (x, w, v, scale)]


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("kind", ["fp64", "bf16"])
def test_what_is_cheap_is_made_again_to_the_bit(
    kind: str, defer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of GELU and layer norm are not kept for the layers that need them in backward."""
    less, gradients = made_again(kind, defer)
    for one in (fused.gelu, norm.layer_norm):
        monkeypatch.setattr(one, "remake", None)
    more, expected = made_again(kind, defer)
    assert more - less == 2 * 9 * 8 * backend.dtype(kind).itemsize
    for found, same in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(found, same)


def test_nothing_is_kept_under_no_grad() -> None:
    x, w = leaf(normal(20, 8)), leaf(normal(8, 8))
    before = live()
    with no_grad():
        out = network(x, w)
    assert out.ctx is None and live() - before <= out.data.nbytes


def test_hooks_replace_what_is_saved() -> None:
    """Half precision instead of double: gradients to its precision."""
    x, w = leaf(normal(5, 8)), leaf(normal(8, 8))
    network(x, w).backward()
    exact = x.gradient
    x.grad = w.grad = None
    with saved_tensors_hooks(
        lambda a: (a.dtype, a.astype(np.float16)), lambda p: p[1].astype(p[0])
    ):
        out = network(x, w)
    out.backward()
    assert not np.array_equal(x.gradient, exact)  # type: ignore[arg-type]
    np.testing.assert_allclose(x.gradient, exact, atol=2e-3)  # type: ignore[arg-type]


def test_hooks_may_keep_on_disk_and_unpack_once(tmp_path: Path) -> None:
    names: list[Path] = []
    reads: list[Path] = []

    def pack(array: Array) -> Path:
        names.append(tmp_path / f"{len(names)}.npy")
        np.save(names[-1], array)
        return names[-1]

    def unpack(path: Path) -> Array:
        reads.append(path)
        return np.load(path)  # type: ignore[no-any-return]

    x, w = leaf(normal(5, 8)), leaf(normal(8, 8))
    network(x, w).backward()
    expected = [x.gradient, w.gradient]
    x.grad = w.grad = None
    with saved_tensors_hooks(pack, unpack):
        out = network(x, w)
    assert names and not reads
    out.backward()
    assert sorted(reads) == sorted(names)
    np.testing.assert_array_equal(x.gradient, expected[0])  # type: ignore[arg-type]
    np.testing.assert_array_equal(w.gradient, expected[1])  # type: ignore[arg-type]


def test_hooks_may_return_read_only_or_strided_arrays() -> None:
    def unpack(packed: tuple[bytes, Any, Any]) -> Array:
        data, dtype, shape = packed
        return np.asfortranarray(np.frombuffer(data, dtype).reshape(shape))

    x, w = leaf(normal(5, 8)), leaf(normal(8, 8))
    network(x, w).backward()
    expected = x.gradient
    x.grad = w.grad = None
    with saved_tensors_hooks(lambda a: (a.tobytes(), a.dtype, a.shape), unpack):
        out = network(x, w)
    out.backward()
    np.testing.assert_allclose(x.gradient, expected, rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]


def test_hooks_nest_and_end() -> None:
    seen: list[str] = []

    def hooks(name: str) -> Any:
        return saved_tensors_hooks(lambda a: seen.append(name) or a, lambda a: a)

    x = leaf(normal(3))
    with hooks("outer"):
        x.exp()
        with hooks("inner"):
            x.exp()
        x.exp()
        with no_grad():
            x.exp()
    x.exp()
    assert seen == ["outer", "inner", "outer"]


def test_parameters_do_not_pass_through_hooks_and_are_asked_again() -> None:
    layer, x = Linear(4, 4, bias=False).double(), leaf(normal(2, 4))
    packed: list[Array] = []
    with saved_tensors_hooks(lambda a: packed.append(a) or a, lambda a: a):
        out = layer(x) * layer(x)
    assert not [a for a in packed if a is layer.weight.data]
    values = layer.weight.data
    layer.weight.data = values.copy()  # its storage moves, as with sharded parameters
    values[...] = np.nan
    out.sum().backward()
    assert np.isfinite(x.gradient).all()  # type: ignore[arg-type]


def test_a_parameter_used_element_by_element_is_asked_again() -> None:
    p, x = Parameter(normal(3)), leaf(normal(3, salt=1))
    out = x * p
    p.data = p.data + 1
    out.sum().backward()
    np.testing.assert_allclose(x.gradient, p.numpy())


def test_a_second_backward_is_an_error_that_says_so() -> None:
    x = leaf(normal(3))
    hidden = x.exp()
    out = hidden.sum()
    out.backward()
    before = x.gradient.copy()  # type: ignore[union-attr]
    for again in (out, (hidden * 2).sum()):
        with pytest.raises(RuntimeError, match=r"ran before through this .*compute the forward"):
            again.backward()
    np.testing.assert_array_equal(x.gradient, before)  # type: ignore[arg-type]
