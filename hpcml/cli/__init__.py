"""The command line: `hpcml COMMAND ...`. What a command needs is imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from hpcml import __version__
from hpcml.errors import UserError

COMMANDS = {
    "train": "train a model: hpcml train CONFIG.toml [section.key=value ...]",
    "check": "compare a parallel run with a serial one: hpcml check CONFIG.toml [key=value ...]",
    "sample": "let a trained model write text: hpcml sample RUN_DIR [--prompt TEXT]",
    "trace": "show what the ranks of a run did when: hpcml trace RUN_DIR [--plot FILE]",
    "doctor": "say what this machine and its MPI can do: hpcml doctor [--json]",
    "bench": "measure: hpcml bench NAME [--json]",
    "schedule": "prove pipelines: hpcml schedule show|check|simulate NAME_OR_FILE",
}
"""Each command is `run(args) -> exit code` of the module `hpcml.cli.<command>`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    A `UserError` is one line on standard error, of the first rank alone: bad input concerns all
    ranks alike, and where it does not, `hpcml.comm.guard.agree` has made it so. Other exceptions
    pass: their traceback is wanted, and in a job of several ranks they end the job.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _command(args)
        sys.stdout.flush()  # here, where a reader who has left is expected
        return code
    except UserError as error:
        if first_rank():
            print(f"hpcml: error: {error.report()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        from hpcml.comm import launch

        if launch.read().size > 1:
            raise  # the others must be ended too
        print("hpcml: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left (`| head`); what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # as a shell reports it


def first_rank() -> bool:
    """Whether this process is the job's first rank as far as the launcher's variables tell."""
    from hpcml.comm import launch

    return launch.read().rank in (None, 0)


def _command(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"hpcml {__version__}")
        return 0
    if args[0] not in COMMANDS:
        near = get_close_matches(args[0], COMMANDS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f'unknown command "{args[0]}": {remedy}')
    run: Callable[[list[str]], int] = importlib.import_module(f"hpcml.cli.{args[0]}").run
    return run(args[1:])


def _usage() -> str:
    lines = [f"  {name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    options = ["  --help, --version, and --help after a command"]
    return "\n".join(["usage: hpcml COMMAND ...", "", *lines, "", *options])
