"""Memory by category: what is counted, for how long, and by which thread."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from hpcml import memory
from hpcml.memory import CATEGORIES, empty, zeros


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[memory.Account]:
    """A fresh account for this thread, which must be balanced in the end."""
    fresh = memory.Account()
    monkeypatch.setattr(memory._local, "account", fresh)
    yield fresh
    gc.collect()
    assert fresh.live == dict.fromkeys(CATEGORIES, 0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_array_is_counted_in_its_category_while_it_lives(
    category: str, account: memory.Account
) -> None:
    array = empty((3, 5), np.float32, category)
    others = dict.fromkeys(CATEGORIES, 0)
    assert account.live == others | {category: 60}
    assert account.peak == others | {category: 60}
    assert array.shape == (3, 5) and array.dtype == np.float32 and array.flags.c_contiguous
    del array
    assert account.live == others
    assert account.peak == others | {category: 60}


def test_the_account_is_that_of_the_thread(account: memory.Account) -> None:
    assert memory.account() is account


def test_bytes_count_until_the_last_view_is_gone(account: memory.Account) -> None:
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


def test_copies_and_results_are_plain_arrays_that_keep_nothing(account: memory.Account) -> None:
    array = zeros((10,), np.float32)
    assert type(array) is np.ndarray
    assert type(array[2:]) is np.ndarray
    result = array + 1
    del array
    assert account.live["activations"] == 0
    assert result.sum() == 10


def test_the_peak_is_the_largest_sum_and_starts_again_from_what_lives(
    account: memory.Account,
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


def test_a_block_of_code_names_the_category(account: memory.Account) -> None:
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


def test_an_unknown_category_is_an_error(account: memory.Account) -> None:
    with pytest.raises(AssertionError, match="weights"), memory.category("weights"):
        pass
    with pytest.raises(KeyError, match="weights"):
        empty((1,), np.uint8, "weights")


def test_each_thread_has_its_own_account(account: memory.Account) -> None:
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
    account: memory.Account,
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
