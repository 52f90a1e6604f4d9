"""`python -m hpcml` is the command line, like `hpcml`."""

from __future__ import annotations

import sys

from hpcml.cli import main

if __name__ == "__main__":
    sys.exit(main())
