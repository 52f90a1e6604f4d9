"""Memory of a rank that several threads take and give back at the same time."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from hpcml import account as accounts
from hpcml import memory
from hpcml.account import CATEGORIES, Account
from hpcml.errors import MemoryLimitError
from hpcml.memory import empty
from tests.test_memory import account

__all__ = ["account"]

NOTHING = dict.fromkeys(CATEGORIES, 0)


def beside(*calls: Callable[[], object]) -> None:
    """Make each call in a thread that works for this one, all at once; raise the first error."""
    mine, errors = memory.standing(), []

    def make(call: Callable[[], object]) -> None:
        memory.stand_in(mine)
        try:
            call()
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    threads = [threading.Thread(target=make, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.fixture
def interrupted() -> Iterator[None]:
    """New threads may give way to others between any two instructions of what counts memory.

    Python itself lets others run only where a call or a loop begins, which is no promise.
    """
    chance, counting = random.Random(0), {memory.__file__, accounts.__file__}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in counting:
            return None
        frame.f_trace_opcodes = True
        if chance.random() < 0.2:
            time.sleep(0)
        return trace

    before = threading.gettrace()
    threading.settrace(trace)
    yield
    threading.settrace(before)  # type: ignore[arg-type]


def test_a_thread_counts_for_the_one_for_which_it_works(account: Account) -> None:
    mine = empty((100,), np.uint8, "params")
    made: list[Any] = []
    with memory.category("grads"):
        beside(lambda: made.extend((empty((5,), np.uint8), empty((40,), np.uint8, "buffers"))))
    assert account.live == NOTHING | {"params": 100, "grads": 5, "buffers": 40}
    made.clear()
    assert account.live == NOTHING | {"params": 100}
    assert (account.total, account.peak_total, account.peak["buffers"]) == (100, 145, 40)
    del mine


def test_one_limit_for_all_its_threads(account: Account) -> None:
    memory.set_limit(100)
    mine = empty((70,), np.uint8, "params")
    with pytest.raises(MemoryLimitError, match=r"(?s)40 bytes of buffers .*params  *70\n"):
        beside(lambda: empty((40,), np.uint8, "buffers"))
    beside(lambda: empty((30,), np.uint8, "buffers"))
    assert account.peak_total == 100
    del mine


def exchange(times: int) -> None:
    """Two threads make arrays, give some back and leave others to each other to give back."""
    posts: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue(), queue.SimpleQueue()]

    def work(own: int) -> None:
        for i in range(times):
            array = empty((i % 7 + 1,), np.uint8, CATEGORIES[i % 5])
            if i % 3 == 0:
                posts[1 - own].put(array)
            if not posts[own].empty():
                posts[own].get()

    beside(lambda: work(0), lambda: work(1))


def test_nothing_is_left_of_what_threads_took_and_gave_back(account: Account) -> None:
    exchange(100_000)
    assert account.live == NOTHING and account.total == 0


@pytest.mark.usefixtures("interrupted")
def test_nothing_is_left_wherever_threads_are_interrupted(account: Account) -> None:
    exchange(150)
    assert account.live == NOTHING and account.total == 0


@pytest.mark.usefixtures("interrupted")
def test_threads_do_not_exceed_together_what_each_may_take(account: Account) -> None:
    memory.set_limit(100)
    taken = []

    def work() -> None:
        for _ in range(100):
            try:
                taken.append(empty((60,), np.uint8).size)
            except MemoryLimitError:
                time.sleep(0)

    beside(work, work)
    assert taken and account.peak_total == 60


def test_the_log_of_changes_stays_short(account: Account) -> None:
    for _ in range(10_000):
        empty((1,), np.uint8)
    assert len(account.log) < 1000


def test_what_the_machine_refuses_is_not_counted(account: Account) -> None:
    with pytest.raises(MemoryError):
        empty((1 << 60,), np.uint8)
    assert account.total == 0
