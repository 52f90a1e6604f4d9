"""`hpcml train CONFIG.toml [section.key=value ...]`."""

from __future__ import annotations

from hpcml.errors import UserError


def run(args: list[str]) -> int:
    """Train as the configuration says; the exit code."""
    if "-h" in args or "--help" in args:
        from hpcml.train.help import help_text

        print(help_text())
        return 0
    from hpcml.comm import guard

    try:
        return _train(args)
    except UserError as error:
        return guard.refuse(error)  # a rank that fails alone takes the others along


def _train(args: list[str]) -> int:
    if not args or "=" in args[0]:
        raise UserError("name a configuration: hpcml train CONFIG.toml [section.key=value ...]")
    from hpcml.train import config
    from hpcml.train.loop import train

    return train(config.load(args[0], args[1:]))
