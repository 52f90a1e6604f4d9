"""Attention and convolutions by cuDNN, a stand-in for it or with HPCML_GPU=1 the real one."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcml import memory
from hpcml.errors import UserError
from hpcml.kernels import generic
from hpcml.kernels.cuda import cudnn as ours
from hpcml.kernels.cuda.cudnn import library
from hpcml.kernels.cuda.cudnn.attention import sdpa, sdpa_backward
from hpcml.kernels.cuda.cudnn.convolution import conv_dgrad, conv_fprop, conv_wgrad
from tests.device import standin, test_training
from tests.device.support import Numbers
from tests.device.test_images import CONVOLUTIONS, convolved

PLAIN = 0, 0, 0, 0, 0, 0
halves = pytest.mark.parametrize("numbers", ["bfloat16", "float16"], indirect=True)
floats = pytest.mark.parametrize("numbers", ["float32", "bfloat16", "float16"], indirect=True)


@pytest.fixture(autouse=True)
def frontend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The stand-in's frontend, or on a GPU the real one, for tests that ask for no stand-in."""
    if os.environ.get("HPCML_GPU") == "1" and "standing_in" not in request.fixturenames:
        pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
        library.forget()
        yield
        library.forget()
        return
    request.getfixturevalue("standing_in")
    with standin.with_cudnn():
        yield


def heads(numbers: Numbers, *lengths: int, depth: int = 24) -> list[Any]:
    """Arrays (2, 2, T, D) that lie as in packed projections."""
    made = [numbers.normal(2, n, 2, depth, scale=1 + i / 10) for i, n in enumerate(lengths)]
    return [tuple(x.transpose(0, 2, 1, 3) for x in pair) for pair in made]


def attended(numbers: Numbers, cuda: Any, q: Any, k: Any, v: Any, causal: bool) -> Any:
    out, lse = numbers.empty(2, q[0].shape[2], 2, 24), numbers.empty(2, 2, q[0].shape[2], sums=True)
    out = tuple(x.transpose(0, 2, 1, 3) for x in out)
    arrays = zip(q, k, v, (0.2, 0.2), (causal, causal), *zip(PLAIN, PLAIN, strict=True), out, lse,
                 strict=True)  # fmt: skip
    found, exact = arrays
    cuda.attention(*found)
    generic.attention(*exact)
    return out, lse


@halves
@pytest.mark.parametrize(("queries", "keys", "causal"), [(64, 128, False), (128, 64, True)])
def test_attention(queries: int, keys: int, causal: bool, numbers: Numbers, cuda: Any) -> None:
    """Forward and backward; the backward of our own kernel takes the sums of cuDNN's forward."""
    q, k, v, g = heads(numbers, queries, keys, keys, queries)
    out, lse = attended(numbers, cuda, q, k, v, causal)
    numbers.close(*out, 4)
    numbers.close(*lse, 50)
    rounded = numbers.pair(out[1])
    for more in (False, True):
        grads = [numbers.normal(*x[1].shape, scale=0.5) for x in (q, k, v)]
        how = (0.2, 0.2), (causal, causal), *zip(PLAIN, PLAIN, strict=True), (more, more)
        found, exact = zip(q, k, v, rounded, lse, g, *how, *grads, strict=True)
        assert not ours.reasons
        cuda.attention_backward(*found)
        generic.attention_backward(*exact)
        for pair in grads:
            numbers.close(*pair, 8)
    assert ours.reasons == {"attention": "gradients are added to others"}


@floats
@pytest.mark.parametrize(("image", "filters", "how"), CONVOLUTIONS)
def test_convolution(image: Any, filters: Any, how: Any, numbers: Numbers, cuda: Any) -> None:
    convolved(image, filters, how, numbers)
    assert not ours.reasons


def test_a_plan_is_made_once(standing_in: Any, cuda: Any) -> None:
    """For each size, stride and type; and by each thread, which has a handle of its own."""
    numbers = Numbers(standing_in, "bfloat16")
    q, k, v = heads(numbers, 64, 64, 64)
    for _ in range(3):
        attended(numbers, cuda, q, k, v, True)
    assert standin.cudnn.made == {"sdpa": 1} and standin.cudnn.ran == {"sdpa": 3}
    attended(numbers, cuda, q, k, v, False)
    assert standin.cudnn.made == {"sdpa": 2}
    with standing_in.cuda.Stream():
        attended(numbers, cuda, q, k, v, True)
    other = threading.Thread(target=attended, args=(numbers, cuda, q, k, v, True))
    other.start()
    other.join()
    assert standin.cudnn.made == {"sdpa": 3} and standin.cudnn.ran == {"sdpa": 6}
    assert not ours.reasons


def test_its_workspace_is_counted(standing_in: Any, cuda: Any) -> None:
    numbers = Numbers(standing_in, "bfloat16")
    q, k, v = heads(numbers, 64, 64, 64)
    attended(numbers, cuda, q, k, v, True)
    account = memory.account()
    out, lse = (standing_in.empty(x, t) for x, t in ((q[0].shape, q[0].dtype), ((2, 2, 64), "f4")))
    account.reset_peak()
    before = account.total
    assert ours.attention(q[0], k[0], v[0], 0.2, True, 0, out, lse)
    assert account.peak_total - before == standin.cudnn.WORKSPACE and account.total == before


@pytest.mark.parametrize(
    ("dtype", "positions", "depth", "threshold", "reason"),
    [("float32", 64, 8, 0, "float32, not 16 bits"), ("bfloat16", 64, 8, 5, "dropout draws"),
     ("bfloat16", 66, 8, 0, "66 positions"), ("bfloat16", 64, 12, 0, "aligned"),
     ("bfloat16", 64, 136, 0, "less than or equal to 128")],
)  # fmt: skip
def test_what_it_does_not_take_is_left_with_one_line(
    dtype: str, positions: int, depth: int, threshold: int, reason: str,
    standing_in: Any, caplog: Any,
) -> None:  # fmt: skip
    numbers = Numbers(standing_in, dtype)
    q, k, v = (x for x, _ in heads(numbers, *[positions] * 3, depth=depth))
    out, lse = standing_in.empty(q.shape, q.dtype), standing_in.empty(q.shape[:3], np.float32)
    for _ in range(2):
        assert not ours.attention(q, k, v, 1.0, True, threshold, out, lse)
    (line,) = caplog.messages
    assert line.startswith("attention not by cuDNN: ") and reason in line


def test_arrays_that_are_not_aligned_and_other_padding_are_left(device: Any) -> None:
    numbers = Numbers(device, "bfloat16")
    room = numbers.normal(2, 2, 65, 8)[0]
    q = room.reshape(-1)[1 : 1 + 2 * 2 * 64 * 8].reshape(2, 2, 64, 8)
    out, lse = device.empty(q.shape, q.dtype), device.empty(q.shape[:3], np.float32)
    assert not ours.attention(q, q, q, 1.0, True, 0, out, lse)
    assert "aligned" in ours.reasons["attention"]
    x, weight = numbers.normal(1, 9, 9, 8)[0], numbers.normal(8, 8, 3, 3)[0]
    out = device.empty((1, 4, 7, 8), x.dtype)
    assert not ours.convolve(x, weight, weight[:0], (1, 1), (0, 0), (1, 1), out)
    assert "windows that end" in ours.reasons["convolution"]
    wide = x.astype(np.float64)
    ours.reasons.clear()
    assert not ours.convolve_weight_gradient(out, wide, (1, 1), (0, 0), (1, 1), weight)
    assert ours.reasons["convolution"] == "float64"


def test_it_can_be_turned_off(device: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv(ours.VARIABLE, "never")
    library.forget()
    numbers = Numbers(device, "bfloat16")
    x, weight = numbers.normal(1, 3, 8)[0], numbers.normal(8, 8, 1)[0]
    out = device.empty((1, 3, 8), x.dtype)
    assert not ours.convolve(x, weight, weight[:0], (1,), (0,), (1,), out)
    assert ours.reasons == {"convolution": "HPCML_CUDNN=never"} and not caplog.messages
    assert ours.version() == "(HPCML_CUDNN=never)"
    monkeypatch.setenv(ours.VARIABLE, "perhaps")
    library.forget()
    with pytest.raises(UserError, match="HPCML_CUDNN='perhaps' is not known: set one of auto"):
        ours.version()


def test_the_doctor_tries_it(device: Any) -> None:
    from hpcml.kernels.cuda.paths import tried

    assert tried() == {"version": ours.version(), "left": {}}
    assert ours.version().startswith("cuDNN 9.")


def test_training_by_it(standing_in: Any) -> None:
    """Divided images in float32, whose losses are the CPU's; no layer takes our own kernels."""
    found = test_training.of_images("cuda", "float32", 2, sp_h=2)
    expected = test_training.of_images("cpu", "float32")
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert not ours.reasons
    assert {"conv_fprop", "conv_dgrad", "conv_wgrad"} == standin.cudnn.ran.keys()


def test_deterministic_mode_takes_what_sums_in_one_order(standing_in: Any) -> None:
    runs = [
        test_training.of_images("cuda", "float32", deterministic=wanted)
        for wanted in (False, False, True, True)
    ]
    assert runs[0] != runs[1] and runs[2] == runs[3]


@pytest.mark.parametrize(
    ("compose", "options", "inputs", "results"),
    [
        (sdpa, (0.2, True), ["q", "q", "q"], ["q", "sums"]),
        (sdpa_backward, (0.2, False, True), ["q", "q", "q", "q", "q", "sums"], ["q", "q", "q"]),
        (conv_fprop, "how", ["x", "w"], ["y"]),
        (conv_dgrad, "how", ["y", "w"], ["x"]),
        (conv_wgrad, "how", ["y", "x"], ["w"]),
    ],
)
def test_graphs_are_valid_for_the_frontend_that_is_installed(
    compose: Any, options: Any, inputs: Any, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and arguments, as far as that can be found out without a GPU."""
    if "stand-in" in sys.modules["cudnn"].__version__:
        monkeypatch.delitem(sys.modules, "cudnn")
    real = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    layouts = {
        "q": ((2, 3, 64, 16), (64 * 144, 16, 144, 1), "bfloat16"),
        "sums": ((2, 3, 64, 1), (192, 64, 1, 1), "float32"),
        "x": ((2, 16, 7, 9), (1008, 1, 144, 16), "bfloat16"),
        "w": ((8, 16, 3, 3), (144, 1, 48, 16), "bfloat16"),
        "y": ((2, 8, 4, 9), (288, 1, 72, 8), "bfloat16"),
    }
    how = ((1, 1), (1, 1), (2, 1), (1, 1)) if options == "how" else options
    every = [[layouts[name] for name in names] for names in (inputs, results)]
    try:
        graph, tensors = library.describe(real, None, compose, *every, how)
    except RuntimeError as error:
        if "CUDA driver" not in str(error):
            raise
        pytest.skip(f"described, but to look at it takes a GPU: {error}")
    assert graph is not None and len(tensors) == len(inputs) + len(results)
