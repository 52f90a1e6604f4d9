"""A plugin of pytest for gpu_tests.py: writes down each outcome at once, and goes on after a crash.

Lines of JSON are added to the file that the environment names: [test, outcome, why] for each test
("died" when it begins, replaced by the next line with its name), {"count": tests} at the beginning,
those of other processes included, {"ended": true} when all of its own were tried. Tests that the
file names are not run again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device.support import DTYPES

PROGRESS = "HPCML_GPU_PROGRESS"
"""The environment's name of the file."""
SHARE = "HPCML_GPU_SHARE"
"""Which of the processes that share the tests this is."""
PROCESSES = len(DTYPES)
_NONE_LEFT = pytest.ExitCode.NO_TESTS_COLLECTED
_stderr = os.dup(2)  # pytest takes the other one while tests run


def _write(what: Any) -> None:
    with Path(os.environ[PROGRESS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def _known() -> set[str]:
    lines = Path(os.environ[PROGRESS]).read_text(encoding="utf-8").splitlines()
    return {found[0] for line in lines if isinstance(found := json.loads(line), list)}


def _share(position: int, item: pytest.Item) -> int:
    """The process that a test belongs to: that of its type, which it says by its parameters."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    types = [value for value in parameters if isinstance(value, str) and value in DTYPES]
    return DTYPES.index(types[0]) if types else position % PROCESSES


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what was tried before, and what is another's."""
    known, own = _known(), int(os.environ[SHARE])
    if not known:
        _write({"count": len(items)})
    items[:] = [
        item for position, item in enumerate(items)
        if _share(position, item) == own and item.nodeid not in known
    ]  # fmt: skip


def pytest_runtest_logstart(nodeid: str) -> None:
    """Should the process end now, it was this test."""
    _write([nodeid, "died", "ended its process"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how a phase of a test went; the whole of a failure goes to the log."""
    if report.failed:
        os.write(_stderr, f"FAILED {report.nodeid}\n{report.longreprtext}\n".encode())
        lines = report.longreprtext.splitlines()
        said = [line for line in lines if line.startswith("E ")] or lines[-1:]
        _write([report.nodeid, "failed", " ".join(said[0][1:].split())[:300]])
    elif report.skipped:
        _write([report.nodeid, "skipped", str(report.longrepr[2])[:200]])  # type: ignore[index]
    elif report.when == "call":
        _write([report.nodeid, "passed", ""])


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Wait for the GPU: what it refused to do is this test's failure, and the last of this process.

    CUDA answers every call with the same error once a kernel has gone astray.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except Exception as error:  # noqa: BLE001 (of CuPy's own kinds)
        _write([nodeid, "failed", f"the GPU's context was lost: {error}"])
        os.write(_stderr, f"LOST by {nodeid}: {error}\n".encode())
        os._exit(1)


def pytest_sessionfinish(exitstatus: int) -> None:
    """All were tried, unless something has stopped them."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, _NONE_LEFT):
        _write({"ended": True})
