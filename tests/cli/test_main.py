"""The entrance of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import hpcml.cli
from hpcml.cli import main
from hpcml.errors import NonFiniteError, UserError


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "check", "sample", "doctor", "bench"))
    assert main([]) == 2
    assert capsys.readouterr().out == shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpcml {hpcml.__version__}\n"


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        'hpcml: error: unknown command "trian": did you mean train?\n'
    )


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a=1\nmust be 2"), 2), (NonFiniteError("loss is nan"), 3)]
)
def test_users_errors_are_printed_once_without_traceback(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: list[str]) -> int:
        raise error

    monkeypatch.setattr(hpcml.cli, "_command", fail)
    assert main([]) == code
    assert capsys.readouterr().err == f"hpcml: error: {' '.join(str(error).split())}\n"
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "3")
    assert main([]) == code
    assert capsys.readouterr().err == ""


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpcml.cli, "_command", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_the_entrance_is_light() -> None:
    """Asking for the version neither compiles nor loads MPI."""
    code = (
        "import sys; from hpcml.cli import main; main(['--version']); "
        "sys.exit(bool({'numba', 'mpi4py', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
