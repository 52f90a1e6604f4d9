"""Memory by category: what is counted, for how long, and by which thread."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import hpcml.cli
from hpcml import memory
from hpcml.account import CATEGORIES, Account
from hpcml.comm import Mesh
from hpcml.comm.threads import run
from hpcml.errors import MemoryLimitError, UserError
from hpcml.memory import empty, zeros


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """A fresh account for this thread, which must be balanced in the end."""
    fresh = Account()
    monkeypatch.setattr(memory._local, "account", fresh)
    yield fresh
    gc.collect()
    assert fresh.live == dict.fromkeys(CATEGORIES, 0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_array_is_counted_in_its_category_while_it_lives(
    category: str, account: Account
) -> None:
    array = empty((3, 5), np.float32, category)
    others = dict.fromkeys(CATEGORIES, 0)
    assert account.live == others | {category: 60}
    assert account.peak == others | {category: 60}
    assert array.shape == (3, 5) and array.dtype == np.float32 and array.flags.c_contiguous
    del array
    assert account.live == others
    assert account.peak == others | {category: 60}


def test_the_account_is_that_of_the_thread(account: Account) -> None:
    assert memory.account() is account


def test_bytes_count_until_the_last_view_is_gone(account: Account) -> None:
    array = empty((100, 100), np.float64)
    view = array[3:].reshape(-1).view(np.float32)[::2]
    other = array.T
    del array
    assert account.live["activations"] == 80_000
    del other
    assert account.live["activations"] == 80_000
    view[...] = 1
    del view
    assert account.live["activations"] == 0


def test_copies_and_results_are_plain_arrays_that_keep_nothing(account: Account) -> None:
    array = zeros((10,), np.float32)
    assert type(array) is np.ndarray
    assert type(array[2:]) is np.ndarray
    result = array + 1
    del array
    assert account.live["activations"] == 0
    assert result.sum() == 10


def test_the_peak_is_the_largest_sum_and_starts_again_from_what_lives(
    account: Account,
) -> None:
    kept = empty((1000,), np.uint8, "buffers")
    first = empty((500,), np.uint8, "buffers")
    del first
    second = empty((400,), np.uint8, "buffers")
    assert (account.live["buffers"], account.peak["buffers"]) == (1400, 1500)
    account.reset_peak()
    assert account.peak["buffers"] == 1400
    del second
    assert (account.live["buffers"], account.peak["buffers"]) == (1000, 1400)
    del kept


def test_a_block_of_code_names_the_category(account: Account) -> None:
    made = []
    with memory.category("params"):
        made.append(empty((4,), np.uint8))
        with contextlib.suppress(RuntimeError), memory.category("optim"):
            made.append(zeros((5,), np.uint8))
            raise RuntimeError
        made.append(empty((6,), np.uint8))
        made.append(empty((7,), np.uint8, "grads"))
    made.append(empty((8,), np.uint8))
    assert list(account.live.values()) == [10, 7, 5, 8, 0]


def test_an_unknown_category_is_an_error(account: Account) -> None:
    with pytest.raises(AssertionError, match="weights"), memory.category("weights"):
        pass
    with pytest.raises(KeyError, match="weights"):
        empty((1,), np.uint8, "weights")


def test_each_thread_has_its_own_account(account: Account) -> None:
    seen = []

    def other() -> None:
        array = empty((9,), np.uint8)
        seen.append(memory.account().live["activations"])
        del array

    mine = empty((5,), np.uint8)
    with memory.category("params"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [9]  # and not as "params": the category too is the thread's
    assert account.live["activations"] == 5
    del mine


def test_an_array_freed_by_another_thread_is_taken_off_the_account_that_made_it(
    account: Account,
) -> None:
    arrays = [empty((5,), np.uint8)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert account.live["activations"] == 0


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 1_000_003])
def test_large_arrays_start_at_a_cache_line(size: int) -> None:
    arrays = [empty((size,), np.uint8) for _ in range(5)]
    assert {array.ctypes.data % memory.ALIGNMENT for array in arrays} == {0}
    for array in arrays:  # the last byte belongs to the array
        array[-1] = 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", ml_dtypes.bfloat16])
def test_all_shapes_and_dtypes(shape: tuple[int, ...], dtype: str) -> None:
    array = zeros(shape, dtype)
    assert array.shape == shape and array.dtype == dtype
    assert not np.any(array.astype(np.float32))
    assert array.flags.writeable and array.flags.aligned


def test_the_total_and_its_peak_are_over_all_categories(account: Account) -> None:
    first = empty((100,), np.uint8, "params")
    second = empty((50,), np.uint8, "buffers")
    del second
    third = empty((30,), np.uint8, "optim")
    assert (account.total, account.peak_total) == (130, 150)
    assert account.peak == {"params": 100, "grads": 0, "optim": 30, "activations": 0, "buffers": 50}
    account.reset_peak()
    assert account.peak_total == 130
    del first, third
    assert (account.total, account.peak_total) == (0, 130)


def test_the_limit_is_reached_and_not_exceeded(account: Account) -> None:
    memory.set_limit(1000)
    kept = empty((600,), np.uint8, "params")
    last = zeros((400,), np.uint8, "grads")
    with pytest.raises(MemoryLimitError):
        empty((1,), np.uint8)
    assert (account.total, account.peak_total) == (1000, 1000)
    nothing = empty((0,), np.uint8)
    del last
    again = empty((400,), np.uint8)
    memory.set_limit(0)
    more = empty((10_000,), np.uint8)
    assert account.total == 11_000
    del kept, nothing, again, more


def test_a_refusal_says_where_all_the_memory_went(account: Account) -> None:
    memory.set_limit(20_000)
    kept = empty((12_345,), np.uint8, "params"), empty((500,), np.uint8, "activations")
    with pytest.raises(UserError) as caught, memory.category("optim"):
        zeros((2000,), np.float32)
    error = caught.value
    assert isinstance(error, MemoryLimitError) and error.exit_code == 2
    assert str(error) == (
        "8,000 bytes of optim exceed the memory limit of 20,000, of which 12,845 are in use: "
        "hold less, or set a higher limit\n"
        "where did all the memory go   bytes\n"
        "  params                     12,345\n"
        "  grads                           0\n"
        "  optim                           0\n"
        "  activations                   500\n"
        "  buffers                         0\n"
        "  in use                     12,845\n"
        "  asked for (optim)           8,000\n"
        "  limit                      20,000"
    )
    assert error.report() == str(error)
    assert (error.category, error.request, error.limit) == ("optim", 8000, 20_000)
    assert error.live == account.live
    error.advise("a smaller model would fit")
    assert str(error).splitlines()[-2:] == ["  limit                      20,000",
                                            "a smaller model would fit"]  # fmt: skip
    del kept


def test_nothing_is_allocated_that_is_refused() -> None:
    """These sizes exist on no machine: were they allocated first, that would fail otherwise."""
    memory.set_limit(1 << 40)
    for make in (empty, zeros):
        with pytest.raises(MemoryLimitError):
            make((1 << 60,), np.uint8)


def test_adopted_memory_counts_against_the_limit(account: Account) -> None:
    memory.set_limit(100)
    region = bytearray(200)
    array = memory.adopt(region, 0, (100,), np.uint8, "grads", None)
    with pytest.raises(MemoryLimitError):
        memory.adopt(region, 100, (1,), np.uint8, "grads", None)
    assert account.total == 100
    del array


def test_garbage_is_collected_before_a_refusal(account: Account) -> None:
    class Holder:
        pass

    memory.set_limit(100)
    gc.disable()  # only a refusal may collect
    try:
        holder = Holder()
        holder.itself, holder.array = holder, empty((90,), np.uint8)
        del holder
        assert account.total == 90
        array = empty((100,), np.uint8)
        assert account.total == 100
    finally:
        gc.enable()
    del array


def test_the_limit_belongs_to_the_thread(account: Account) -> None:
    memory.set_limit(10)
    made = []
    thread = threading.Thread(target=lambda: made.append(empty((20,), np.uint8).size))
    thread.start()
    thread.join()
    assert made == [20]


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="memory limit -1"):
        memory.set_limit(-1)


def test_every_rank_refuses_memory_to_share_before_any_is_made() -> None:
    def rank() -> str:
        axis = Mesh()["dp"]
        memory.set_limit(1000)
        with pytest.raises(MemoryLimitError) as caught:
            axis.empty((1 << 60,), np.uint8, "grads")
        return caught.value.category

    assert run(rank, ranks=2) == ["grads", "grads"]


def test_the_command_line_prints_the_table_with_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(args: list[str]) -> int:
        memory.set_limit(5)
        return int(empty((6,), np.uint8).size)

    monkeypatch.setattr(hpcml.cli, "_command", refused)
    assert hpcml.cli.main(["train"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("hpcml: error: 6 bytes of activations") and len(lines) == 10
    assert lines[-1].split() == ["limit", "5"]
