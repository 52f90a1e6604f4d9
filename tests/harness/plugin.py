"""pytest plugin: every test has a limit, and all ranks agree on the outcome of every test.

Under `mpiexec -n N python -m pytest --with-mpi` each rank runs the same tests. After each phase of
a test (set-up, call, teardown) the ranks exchange their outcomes. If one has failed, the test has
failed on all of them, rank 0 prints what each rank has to say, and the run goes on.

Where that is impossible, because a rank waits for another that never comes, the limit of the test
or, after a failure, the shorter grace runs out. Then one rank prints the failures and the stacks of
all ranks and ends the job. A test's limit is `test_limit` of the configuration, overridden by the
environment's HPCML_TEST_LIMIT, overridden by `@pytest.mark.limit(seconds)`.

Nothing that ends a job relies on MPI or on the interpreter: a rank may be blocked in either.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.harness.board import FINISHED, VARIABLE, Board, write
from tests.harness.ranks import Alone, LostStep, Ranks, Verdict
from tests.harness.workers import VARIABLE as WORKER
from tests.harness.workers import Sharing

_COLLECTION_LIMIT = 300.0
"""Seconds for importing the test modules."""
_BACKSTOP = 10.0
"""Seconds after which the C thread of faulthandler acts if no Python thread can."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Settings of `[tool:pytest]`."""
    parser.addini("test_limit", "seconds a test may take, fixtures included", default="120")
    parser.addini("test_grace", "seconds a failed rank waits for the others", default="10")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Join the other ranks."""
    config.addinivalue_line("markers", "limit(seconds): how long this test may take")
    # A shell without job control starts what is to run beside it deaf to interrupts, and its
    # children inherit that: tests of what an interrupt does would wait for one for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(Safety(config), "hpcml-safety")


class Safety:
    """The hooks, with the state of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.limit = float(os.environ.get("HPCML_TEST_LIMIT") or config.getini("test_limit"))
        self.grace = min(float(config.getini("test_grace")), self.limit)
        # Capturing is suspended here, so this is the terminal, whatever tests do to descriptor 2.
        self.stderr = os.dup(2)
        faulthandler.dump_traceback_later(_COLLECTION_LIMIT, exit=True, file=self.stderr)
        self.ranks: Ranks | Alone = Ranks() if config.getoption("--with-mpi") else Alone()
        given = os.environ.pop(VARIABLE, None)  # not for the runs that a test may start
        self.own = None if given else self.ranks.share(_folder)
        self.board = Board(Path(given or str(self.own)))
        # Not for the runs that a test may start, like the folder.
        worker = os.environ.pop(WORKER, None)
        self.board.join(int(worker or self.ranks.rank))
        if worker:
            config.pluginmanager.register(Sharing(self.board), "hpcml-sharing")
        self.timer: threading.Timer | None = None
        self.file: Path | None = None
        self.collection_failures: list[str] = []
        if self.ranks.rank:
            _mute(config)

    # Limits

    def watch(self, what: str, limit: float) -> None:
        """Start the clock of `what`; the clock of what was before stops."""
        self.rest()
        self.board.at(what)
        why = f"{what} exceeded its limit of {limit:g} s"
        self.timer = threading.Timer(limit, self.end, [why])
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(limit + _BACKSTOP, exit=True, file=self.stderr)

    def rest(self) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        if self.timer:
            self.timer.cancel()

    def end(self, why: str) -> None:
        """Print what all ranks are doing, and end the job. Never returns."""
        self.board.dump()
        if not self.board.claim():
            time.sleep(2 * _BACKSTOP)  # the one who claimed it ends this process too
            os._exit(1)
        write(self.stderr, self.board.collect(why))
        time.sleep(0.5)  # the launcher forwards output on its own; let it do so
        self.board.kill()  # not all launchers do, and not always
        if self.own:
            shutil.rmtree(self.own, ignore_errors=True)
        os._exit(1)

    # Hooks, in the order pytest calls them

    def pytest_report_header(self) -> str | None:
        """Which process is which rank."""
        pids = " ".join(str(position.pid) for position in self.board.positions())
        return f"ranks: {self.ranks.size} (processes {pids})" if self.ranks.size > 1 else None

    def pytest_sessionstart(self) -> None:
        """The clock of the collection."""
        self.watch("collecting the tests", _COLLECTION_LIMIT)
        gc.disable()  # all of it stays: looking through it again and again is a sixth of the time
        self.ranks.barrier()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep import errors: only those of rank 0 would be seen."""
        if report.failed:
            self.collection_failures.append(f"{report.nodeid}\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Go on only if all ranks have collected the same tests."""
        tests = "\n".join(item.nodeid for item in session.items)
        found = self.ranks.gather((tests, "\n".join(self.collection_failures)))
        if any(other != found[0] for other in found):
            text = "ranks have collected different tests\n"
            for rank, (names, failures) in enumerate(found):
                text += f"rank {rank}: {len(names.splitlines())} tests\n{failures}"
            raise pytest.UsageError(text)
        gc.enable()
        self.rest()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One clock for the three phases and the wait for the others."""
        if item.path != self.file:
            # Many tests collect garbage, and need not look through what others have left for good:
            # the tests themselves, compiled kernels, the models of fixtures.
            self.file = item.path
            gc.collect()
            gc.freeze()
        mark = item.get_closest_marker("limit")
        self.watch(item.nodeid, float(mark.args[0]) if mark else self.limit)
        try:
            return (yield)
        finally:
            self.rest()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """The outcome of a phase becomes what all ranks agree on."""
        report = yield
        try:
            verdict = self.ranks.agree(report, self._patience(report))
        except LostStep as error:
            self.end(f"{item.nodeid} ({report.when}): {error}")
        else:
            if verdict:
                report.outcome, report.sections = "failed", []
                report.longrepr = verdict  # type: ignore[assignment]  # it has `toterminal`
        return report

    def _patience(self, report: pytest.TestReport) -> float:
        """How long to wait for the others; a failure is left on the board in case they hang."""
        if not report.failed:
            return float("inf")  # the limit of the test is what ends it
        self.board.report(Verdict.text(report))
        return self.grace

    def pytest_internalerror(self, excrepr: object) -> None:
        """A rank that cannot go on leaves the others waiting: end the job."""
        if self.ranks.size > 1:
            self.end(f"internal error on rank {self.ranks.rank}:\n{excrepr}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave MPI together; the C thread watches over that until the process has ended."""
        self.rest()
        if self.board.claimed():  # the report has woken up what was stuck
            self.end("a run that was ended goes on")
        self.board.at(FINISHED)
        faulthandler.dump_traceback_later(3 * _BACKSTOP, exit=True, file=self.stderr)
        self.ranks.barrier()
        self.board.leave()
        if self.own and self.ranks.rank == 0:
            shutil.rmtree(self.own, ignore_errors=True)


def _folder() -> str:
    return tempfile.mkdtemp(prefix="hpcml-test-")


def _mute(config: pytest.Config) -> None:
    """Rank 0 speaks for all: this rank's report of the run goes nowhere."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter:
        reporter._tw._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
