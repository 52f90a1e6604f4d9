"""The package's logger: quiet unless HPCML_LOG asks, each line with the rank it comes from."""

from __future__ import annotations

import logging
import os

from hpcml.errors import UserError

_LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("hpcml")


def setup(rank: int) -> None:
    """Write messages from level HPCML_LOG (default warning) on to standard error, with the rank."""
    level = os.environ.get("HPCML_LOG", "warning").lower()
    if level not in _LEVELS:
        raise UserError(f'HPCML_LOG="{level}" is unknown: use one of {", ".join(_LEVELS)}')
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s", "%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
