"""The threads of a rank: they change how long a kernel takes, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml import backend, kernels
from hpcml.kernels.cpu import team
from tests.kernels.support import DTYPES, Array, bits, close, randoms

ROOT = Path(__file__).resolve().parents[2]
ROWS = [1, 5, 64, 401]
cases = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def any_work_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "LEAST", 1)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of threads, for this test."""
    return lambda count: monkeypatch.setattr(backend, "_threads", count)


def calls(dtype: str, rows: int, width: int = 33) -> Iterator[tuple[str, list[Any], list[Array]]]:
    """Every kernel that threads divide: its name, its arguments, and those that it writes."""
    real = np.dtype(dtype).type
    x, g, y = randoms(dtype, (rows, width), (rows, width), (rows, width))
    (w, b), none = randoms(dtype, (width,), (width,)), np.empty(0, dtype)
    flat, flat_g, flat_m = x.ravel(), g.ravel(), np.abs(y).ravel()
    mean, inverse = x.mean(1), 1 / x.std(1)
    index = np.arange(rows) * 7 % width
    half = x.astype(np.float16).view(np.uint16).ravel()

    def made(name: str, *args: Any, out: tuple[int, ...]) -> tuple[str, list[Any], list[Array]]:
        own = [a.copy() if i in out else a for i, a in enumerate(args)]
        return name, own, [own[i] for i in out]

    for name in ("gelu", "gelu_tanh"):
        yield made(name, flat, y.ravel(), out=(1,))
        yield made(f"{name}_backward", flat_g, flat, y.ravel(), out=(2,))
    yield made("column_sums", x, w, out=(1,))
    yield made("block_squares", flat, 3, np.zeros(flat.size // 3), out=(2,))
    numbers = [real(v) for v in (0.5, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.5)]
    yield made("adam_update", flat, flat_g, flat_m, flat_m, *numbers, True, out=(0, 2, 3))
    yield made("sgd_update", flat, flat_g, flat_m, *numbers[:5], True, out=(0, 2))
    yield made("sgd_plain_update", flat, flat_g, *numbers[:3], out=(0,))
    yield made("layer_norm", x, w, b, real(1e-5), y, mean, inverse, out=(4, 5, 6))
    yield made("layer_norm_backward", g, x, w, mean, inverse, x[:0], y, out=(6,))
    yield made("layer_norm_weight_gradient", g, x, mean, inverse, w, out=(4,))
    yield made("cross_entropy", x, index, -1, mean, inverse, out=(3, 4))
    yield made("cross_entropy_backward", x, index, -1, mean, inverse, y, out=(5,))
    yield made("embedding_backward", g, index, y[:width] * 0 if rows > width else
               np.zeros((width, width), dtype), out=(2,))  # fmt: skip
    runs = np.array([[3, 10], [20, 1]])
    yield made("dropout", x, np.uint64(5), np.uint64(2), np.uint32(1 << 30), runs, 40, y, out=(6,))
    for causal in (False, True):
        q, k, v, do = randoms(dtype, *[(rows, 3, 5, 4)] * 4)
        out, lse = np.empty_like(q), np.empty((rows, 3, 5), dtype)
        how = (real(0.5), causal, np.uint64(5), np.uint64(2), np.uint32(1 << 30), 1, 2, 3)
        yield made("attention", q, k, v, *how, out, lse, out=(11, 12))
        kernels.of(q).attention(q, k, v, *how, out, lse)
        yield made("join_attention", q, lse, k, -lse, out=(0, 1))
        for more in (False, True):
            grads = [g.copy() for g in (k, v, q)]
            yield made("attention_backward", q, k, v, out, lse, do, *how, more, *grads,
                       out=(15, 16, 17))  # fmt: skip
    if dtype == "float32":
        yield made("widen", half, flat, False, out=(1,))
        yield made("narrow", flat, half, False, out=(1,))
    del none


def kernel_of(name: str, dtype: str) -> Any:
    module = kernels.of(np.empty(0, dtype))
    return getattr(module.halves if name in ("widen", "narrow") else module, name)


@cases("rows", ROWS)
@cases("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(
    dtype: str, rows: int, threads: Callable[[int], None]
) -> None:
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found.append({})
        for number, (name, args, written) in enumerate(calls(dtype, rows)):
            kernel_of(name, dtype)(*args)
            found[-1][number, name] = bits(*written)
    for other in found[1:]:
        for name, values in found[0].items():
            assert other[name] == values, name


@cases("rows", ROWS)
@cases("dtype", DTYPES)
def test_products_of_floats(dtype: str, rows: int, threads: Callable[[int], None]) -> None:
    """The BLAS may order additions otherwise for other shapes."""
    x, w, g, b = randoms(dtype, (rows, 33), (17, 33), (rows, 17), (17,))
    k = kernels.of(x)
    for count in (2, 3):
        threads(count)
        out, dx, dw = np.empty_like(g), np.empty_like(x), np.empty_like(w)
        k.linear(x, w, b, out)
        k.linear_input_gradient(g, w, dx)
        k.linear_weight_gradient(g, x, dw)
        close(out, x @ w.T + b, dtype, 10)
        close(dx, g @ w, dtype, 10)
        close(dw, g.T @ x, dtype, 10)


@cases("rows", ROWS)
def test_products_of_bfloat16(rows: int, threads: Callable[[int], None]) -> None:
    halves = [a.astype(ml_dtypes.bfloat16) for a in randoms("float32", (rows, 33), (17, 33), (17,))]
    x, w, b = (a.view(np.uint16) for a in halves)
    for count in (1, 2, 3):
        threads(count)
        out = np.zeros((rows, 17), np.uint16)
        kernels.compiled("float32").brain.linear(x, w, b, out)
        exact = halves[0].astype(np.float64) @ halves[1].astype(np.float64).T + halves[2]
        found = out.view(ml_dtypes.bfloat16).astype(np.float64)
        np.testing.assert_allclose(found, exact, 2**-8, 1e-6)


MATRICES = [
    ((3, 4), (4, 5)), ((7, 3, 4), (4, 5)), ((2, 6, 3, 4), (2, 6, 4, 5)), ((6, 3, 4), (2, 1, 4, 5)),
    ((1, 4), (9, 4, 1)), ((0, 4), (4, 5)), ((3, 0), (0, 5)), ((2, 3, 4), (2, 4, 0)),
]  # fmt: skip


@cases(("a_shape", "b_shape"), MATRICES)
@cases("layout", ["rows", "columns", "read-only", "every second"])
@cases("dtype", DTYPES)
def test_any_product(
    dtype: str, layout: str, a_shape: Any, b_shape: Any, threads: Callable[[int], None]
) -> None:
    a, b = randoms(dtype, a_shape, b_shape)
    if layout == "columns":
        a, b = (np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in (a, b))
    elif layout == "every second":
        a, b = (np.repeat(x, 2, axis=-1)[..., ::2] for x in (a, b))
    elif layout == "read-only":
        a.flags.writeable = b.flags.writeable = False
    expected = a @ b
    for count in (1, 2, 3):
        threads(count)
        out = np.full_like(expected, np.nan, order="C")
        kernels.of(a).matmul(a, b, out)
        close(out, expected, dtype, 10)


def test_threads_may_call_kernels_at_once(threads: Callable[[int], None]) -> None:
    """One of them gets the team, the others do their work alone."""
    threads(3)
    x = randoms("float32", (10_000,))[0]
    k = kernels.of(x)
    expected = np.empty_like(x)
    k.gelu(x, expected)
    wrong: list[int] = []

    def work() -> None:
        for number in range(200):
            out = np.full_like(x, np.nan)
            k.gelu(x, out)
            if not np.array_equal(out, expected):
                wrong.append(number)

    several = [threading.Thread(target=work) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert not wrong


def test_products_have_the_same_bits_without_the_team(threads: Callable[[int], None]) -> None:
    """A rank that finds it taken, by another of the process, does the same ranges alone."""
    threads(2)
    x, w = randoms("float32", (33, 512), (512, 512))
    k = kernels.of(x)
    outs = [np.empty((33, 512), np.float32) for _ in range(2)]
    k.linear(x, w, x[0, :0], outs[0])
    with team._team.for_this_thread(2) as board:
        assert board is not None
        k.linear(x, w, x[0, :0], outs[1])
    assert bits(outs[0]) == bits(outs[1])


def test_a_thread_that_cannot_start_is_done_without(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(team, "_team", team.Team())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    threads(3)
    x = randoms("float32", (1000,))[0]
    out, expected = np.empty_like(x), np.empty_like(x)
    kernels.of(x).gelu(x, out)
    assert not team._team._taken.locked()
    threads(1)
    kernels.of(x).gelu(x, expected)
    assert bits(out) == bits(expected)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_member_that_sleeps_is_woken(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves until there has been nothing to do for a while, and once more for the next job."""
    served, serve = [], team.serve

    def counted(*args: Any) -> None:
        served.append(args)
        serve(*args)

    monkeypatch.setattr(team, "serve", counted)
    monkeypatch.setattr(team, "_team", team.Team())
    threads(2)
    x = randoms("float32", (1000,))[0]
    out = np.empty_like(x)
    k = kernels.of(x)
    for wakings in (1, 2, 3):
        k.gelu(x, out)
        until(lambda number=wakings: len(served) == number, "it was not woken")  # type: ignore[misc]
        (member,) = team._team._members
        until(lambda member=member: member._asleep, "it never sleeps")  # type: ignore[misc]
    team._team._end()


TEAM = """
import os, sys, time
import numpy as np
from hpcml import backend, kernels
from hpcml.kernels.cpu import team
team.LEAST = 1
backend.set_threads(3)
x = np.ones(1000, np.float32)
out = np.empty_like(x)
gelu = kernels.of(x).gelu
gelu(x, out)
assert len(team._team._members) == 2
if {fork}:
    child = os.fork()
    assert not child or os.waitpid(child, 0)[1] == 0
    if not child:
        assert not team._team._members
    gelu(x, out)
    assert np.isfinite(out).all() and len(team._team._members) == 2
"""


@cases("fork", [False, True])
def test_a_process_with_a_team_ends(fork: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TEAM.format(fork=fork)], check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_fails_raises(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the memory for its scratch is not to be had: here its address is another's."""
    threads(2)

    @team.jit.compiled
    def broken(x: Any, out: Any, low: int, high: int) -> None:
        if low > 0:
            raise MemoryError

    x = randoms("float32", (1000,))[0]
    gelu = kernels.of(x).gelu
    broken.compile(gelu.compiled.nopython_signatures[0])
    made = next(iter(broken.overloads.values()))
    monkeypatch.setattr(gelu, "_addresses", {x.dtype: team.jit.address(made)})
    with pytest.raises(MemoryError, match="gelu"):
        gelu(x, np.empty_like(x))
