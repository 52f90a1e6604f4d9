"""Serial tests among several processes: each takes the next test file that no other has taken.

Every process collects all tests, so that nothing has to be handed around. A file is taken by making
a file of its name on the board, which only one process can do. The files that take longest come
first: one of them begun last would leave the other processes without work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from urllib.parse import quote

import pytest

from tests.harness.board import Board

VARIABLE = "HPCML_TEST_WORKER"
"""Environment variable with the number of the process among those that share the tests."""
_FIRST = (
    "tests/kernels/test_compiled.py",
    "tests/device/test_compile.py",
    "tests/test_harness.py",
    "tests/train/test_bad_input.py",
    "tests/comm/test_guard.py",
    "tests/comm/test_rollcall.py",
    "tests/docs/test_data.py",
    "tests/test_bench_collectives.py",
    "tests/cli/test_doctor.py",
    "tests/cli/test_doctor_calls.py",
    "tests/train/test_pipeline_run.py",
    "tests/train/test_modes.py",
    "tests/test_bench_zero.py",
    "tests/parallel/pipeline/test_training.py",
    "tests/parallel/test_faults.py",
    "tests/device/test_script.py",
    "tests/device/test_training.py",
    "tests/device/test_waits.py",
)
"""Files that take more than 20 seconds: a hint, which changes no result. The first one compiles the
kernels of float32 and leaves them to the others, the next two need none: what starts jobs with
short limits of time comes after that, and most of what needs kernels of float64 after these."""


class Sharing:
    """The hooks of one process."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def pytest_report_header(self) -> str:
        """Whose tests these are."""
        return f"one of several processes that share the tests: number {self.board.rank}"

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """As pytest's own loop, over the files that this process gets to take."""
        if session.testsfailed or session.config.option.collectonly:
            return None
        for tests in self._taken(session.items):
            # At the end of a file its fixtures end: nobody knows yet which one comes next.
            for item, following in zip(tests, [*tests[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        return True

    def _taken(self, items: list[pytest.Item]) -> Iterator[list[pytest.Item]]:
        # The order is kept within a file: Python's sort is stable.
        for file, tests in groupby(sorted(items, key=_turn), _file):
            if self.board.take(f"taken {quote(file, safe='')}"):
                yield list(tests)


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _turn(item: pytest.Item) -> int:
    file = _file(item)
    return _FIRST.index(file) if file in _FIRST else len(_FIRST)
